"""Presets: YAML files that lie under a run's own, so that a run says only what is special about it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mmkd.base.config import read_mapping
from mmkd.base.errors import ConfigError


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    files = resources.files("mmkd.distill.presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def composed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's content over its presets: later presets over earlier ones, the run's own keys over all.

    `preset` is a name, the path of a YAML file beside the run, or a list of such. Mappings are merged key by
    key, everything else is replaced.

    Raises:
        ConfigError: a preset that does not exist, or is not a list of names.
    """
    named = content.get("preset", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: preset: expected a name or a list of names, one of {', '.join(preset_names())}")
    merged: dict[str, Any] = {}
    for name in names:
        merged = _laid_over(merged, _preset(name, path))
    return _laid_over(merged, content | {"preset": names})


def _preset(name: str, path: Path) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        return read_mapping(path.resolve().parent / name)
    if name not in preset_names():
        raise ConfigError(f"{path}: preset: {name!r} is unknown; there are {', '.join(preset_names())}, or a YAML file")
    text = resources.files("mmkd.distill.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for name, value in above.items():
        under = both.get(name)
        both[name] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both
