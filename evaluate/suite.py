"""Suites: which data sets, which tasks and which models, read from YAML into frozen models.

suite: my-suite
store: features            # an mmkd store, relative to this file
ensembles: {all-nine: [biomedclip, pmcclip]}
settings: {linear_probe: {fractions: [1.0]}}
datasets:
  - dataset: lung
    modality: histopathology
    label: diagnosis       # a column of the sample table
    group: patient
    rows: {train: {split: train}, test: {split: test}}
    prompts: {rows: {split: prompt}}
    tasks: [zero_shot, linear_probe, retrieval]
  - datasets/*.yaml        # or files, one data set each
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from mmkd.evaluate.dataset_spec import DatasetSpec, folder_name
from mmkd.evaluate.settings import BootstrapSettings
from mmkd.store.errors import ConfigError
from mmkd.store.yaml_config import Frozen, read_mapping, validated


class Suite(Frozen):
    """Data sets, models and statistics of one evaluation."""

    suite: str
    version: int = 1
    models: tuple[str, ...] | None = None
    """Encoders by their name in the store; by default all of them."""
    ensembles: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name to members, which need not be listed as models."""
    bootstrap: BootstrapSettings = BootstrapSettings()
    datasets: tuple[DatasetSpec, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _share_with_datasets(cls, raw: Any) -> Any:
        """Give the suite's `store` and `settings` to every data set, whose own come first."""
        if not isinstance(raw, Mapping):
            return raw
        shared = {key: raw[key] for key in ("store", "settings") if key in raw}
        own = {key: value for key, value in raw.items() if key not in shared}
        datasets = own.get("datasets")
        if isinstance(datasets, list | tuple):
            own["datasets"] = [_merged(shared, item) if isinstance(item, Mapping) else item for item in datasets]
        return own

    @field_validator("ensembles")
    @classmethod
    def _ensembles_are_named(cls, ensembles: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, members in ensembles.items():
            folder_name(name)
            if len(set(members)) < 2 or len(set(members)) != len(members):
                raise ValueError(f"ensemble {name} needs two or more different members, got {list(members)}")
        return ensembles

    @model_validator(mode="after")
    def _names_are_unique(self) -> Suite:
        names = [spec.dataset for spec in self.datasets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data set {twice[0]!r} stands twice in the suite")
        clash = sorted(set(self.models or ()) & set(self.ensembles))
        if clash:
            raise ValueError(f"{clash[0]!r} is both a model and an ensemble")
        return self

    def dataset(self, name: str) -> DatasetSpec:
        """The data set of this name.

        Raises:
            KeyError: it is not in the suite.
        """
        return {spec.dataset: spec for spec in self.datasets}[name]


def load_suite(path: str | Path) -> Suite:
    """Read a suite file; paths in it are relative to the file.

    Raises:
        ConfigError: missing, not YAML, or not a suite; the message names the key.
    """
    source = Path(path)
    raw = read_mapping(source)
    for holder in [raw, *_listed(raw.get("datasets"))]:
        if isinstance(holder, dict) and isinstance(holder.get("store"), str):
            holder["store"] = _beside(source, holder["store"])
    if isinstance(raw.get("datasets"), list):
        raw["datasets"] = [spec for item in raw["datasets"] for spec in _dataset_entries(source, item)]
    return validated(Suite, raw, source)


def _dataset_entries(source: Path, item: object) -> list[object]:
    """A data set written in place, or those in the files that a pattern names."""
    if not isinstance(item, str):
        return [item]
    files = sorted(source.parent.glob(item))
    if not files:
        raise ConfigError(f"{source}: no data set file matches {item!r}; name files relative to the suite")
    entries: list[object] = []
    for file in files:
        entry = read_mapping(file)
        if isinstance(entry.get("store"), str):
            entry["store"] = _beside(file, entry["store"])
        entries.append(entry)
    return entries


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _beside(source: Path, path: str) -> str:
    return str((source.parent / Path(path).expanduser()).resolve())


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `shared`, down into nested mappings."""
    merged = dict(shared)
    for key, value in own.items():
        below = merged.get(key)
        nested = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(below, value) if nested else value  # type: ignore[arg-type]
    return merged
