"""Presets: YAML files below a run's own, so that a run states only its differences."""

from pathlib import Path
from typing import Any

from mmkd.base.config import merged, read_mapping
from mmkd.base.errors import ConfigError

SCHEMES = ("local-dir:", "hf-hub:")
"""Keys of open_clip folders: network, weights, preprocessing and tokenizer together."""
_FOLDER = Path(__file__).parent
_PATHS: dict[str, Any] = {
    "store": {},
    "out": {},
    "student": {"model": {}, "start_from": {}, "pretrained": {"image": {}, "text": {}}},
    "heads": {"alignment": {}},
    "data": {"cache": {}},
    "monitor": {"sets": {"store": {}}},
}
"""Keys of paths."""
_MAY_BE_NAMES = ("model", "pretrained", "image", "text")
"""Keys whose value may be a name that open_clip knows."""
_FILES = (".bin", ".json", ".npz", ".pt", ".pth", ".safetensors")


def compose(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Lay a run's content over its presets, later ones over earlier ones. `preset` is a name, the path of a YAML file
    beside the run, or a list of such. Mappings are merged key by key. Paths become absolute; each is relative to the
    file that names it. Raises ConfigError for a preset that does not exist, or is not a list of names."""
    names, presets = content.get("preset", []), sorted(file.stem for file in _FOLDER.glob("*.yaml"))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: preset: expected a name or a list of names, one of {', '.join(presets)}")
    whole: dict[str, Any] = {}
    for name in names:
        own = name.endswith((".yaml", ".yml"))
        if not own and name not in presets:
            raise ConfigError(f"{path}: preset: {name!r} is unknown; there are {', '.join(presets)}, or a YAML file")
        file = path.resolve().parent / name if own else _FOLDER / f"{name}.yaml"
        whole = merged(whole, _resolve(read_mapping(file), file.parent, _PATHS))
    return merged(whole, _resolve(content, path.resolve().parent, _PATHS) | {"preset": names})


def _resolve(value: Any, folder: Path, paths: dict[str, Any], key: str = "") -> Any:
    """Return a value with the paths in it, also behind `local-dir:`, beside the file in `folder`. Names of open_clip,
    and values that are no paths, stay as they are."""
    if isinstance(value, dict):
        return value | {name: _resolve(value[name], folder, paths[name], name) for name in paths if name in value}
    if isinstance(value, list):
        return [_resolve(entry, folder, paths, key) for entry in value]
    if not isinstance(value, str) or not value or value.startswith("hf-hub:") or "://" in value:
        return value
    if paths and key != "pretrained":
        return value
    scheme = "local-dir:" if value.startswith("local-dir:") else ""
    place = folder / value.removeprefix(scheme)
    named = scheme or key not in _MAY_BE_NAMES or place.suffix in _FILES or place.exists()
    return f"{scheme}{place}" if named else value
