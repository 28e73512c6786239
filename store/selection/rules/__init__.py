"""Rules shipped with mmkd: YAML files, named instead of a path; comments give their reasons."""

from pathlib import Path

from mmkd.base.errors import ConfigError

HERE = Path(__file__).parent


def shipped_rules() -> dict[str, Path]:
    """Return name to file, in order of names."""
    return {path.stem: path for path in sorted(HERE.glob("*.yaml"))}


def find_rule(name: str) -> Path:
    """Return the file of a rule, given a path or the name of a shipped rule. Raises ConfigError if it is neither."""
    if Path(name).is_file():
        return Path(name)
    known = shipped_rules()
    if name not in known:
        raise ConfigError(f"no rule {name!r}: neither a file nor one of {', '.join(known)}")
    return known[name]
