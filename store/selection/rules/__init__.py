"""Rules that come with mmkd: YAML files with their reasons in the comments, named instead of a path."""

from __future__ import annotations

from pathlib import Path

from mmkd.base.errors import ConfigError

HERE = Path(__file__).parent


def shipped_rules() -> dict[str, Path]:
    """Name to file, in order of names."""
    return {path.stem: path for path in sorted(HERE.glob("*.yaml"))}


def find_rule(name: str) -> Path:
    """The file of a rule: a path, or the name of one that comes with mmkd.

    Raises:
        ConfigError: neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped_rules()
    if name not in known:
        raise ConfigError(f"no rule {name!r}: neither a file nor one of {', '.join(known)}")
    return known[name]
