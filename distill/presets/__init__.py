"""Presets: YAML files below a run's own, so that a run states only its differences."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mmkd.base.config import read_mapping
from mmkd.base.errors import ConfigError

SCHEMES = ("local-dir:", "hf-hub:")
"""Keys of open_clip folders: network, weights, preprocessing and tokenizer together."""
_MAY_BE_NAMES = ("model", "pretrained", "image", "text")
"""Keys whose value may be a name that open_clip knows."""
_FILES = (".bin", ".json", ".npz", ".pt", ".pth", ".safetensors")


def preset_names() -> list[str]:
    """Return names of the presets that come with the package."""
    files = resources.files("mmkd.distill.presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def composed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a run's content over its presets: later presets over earlier ones, the run's own keys over all. `preset`
    is a name, the path of a YAML file beside the run, or a list of such. Mappings are merged key by key, everything
    else is replaced. Paths become absolute; each is relative to the file that names it. Raises ConfigError for a preset
    that does not exist, or is not a list of names."""
    named = content.get("preset", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: preset: expected a name or a list of names, one of {', '.join(preset_names())}")
    merged: dict[str, Any] = {}
    for name in names:
        merged = _laid_over(merged, _preset(name, path))
    return _laid_over(merged, _placed(content, path) | {"preset": names})


def _preset(name: str, path: Path) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        file = path.resolve().parent / name
        return _placed(read_mapping(file), file)
    if name not in preset_names():
        raise ConfigError(f"{path}: preset: {name!r} is unknown; there are {', '.join(preset_names())}, or a YAML file")
    text = resources.files("mmkd.distill.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _placed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content with absolute paths. Values that are no paths are left for validation."""
    folder = path.resolve().parent

    def place(part: object, *keys: str) -> Any:
        if not isinstance(part, dict):
            return part
        return part | {key: _beside(folder, key, part[key]) for key in keys if isinstance(part.get(key), str)}

    placed: dict[str, Any] = place(content, "store", "out")
    for section, keys in (("student", ("model", "pretrained", "start_from")), ("heads", ("alignment",))):
        if section in placed:
            placed[section] = place(placed[section], *keys)
    student, monitor = placed.get("student"), placed.get("monitor")
    if isinstance(student, dict) and "pretrained" in student:
        placed["student"] = student | {"pretrained": place(student["pretrained"], "image", "text")}
    if isinstance(monitor, dict) and isinstance(monitor.get("sets"), list):
        placed["monitor"] = monitor | {"sets": [place(entry, "store") for entry in monitor["sets"]]}
    return placed


def _beside(folder: Path, key: str, value: str) -> str:
    """Return a path in `value`, also behind `local-dir:`, as one beside the file in `folder`; other names as they
    are."""
    scheme, path = ("local-dir:", value[10:]) if value.startswith("local-dir:") else ("", value)
    there = folder / path
    named = scheme or key not in _MAY_BE_NAMES or there.suffix in _FILES or there.exists()
    return f"{scheme}{there}" if value and named and not value.startswith("hf-hub:") else value


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for name, value in above.items():
        under = both.get(name)
        both[name] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both
