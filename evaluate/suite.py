"""Suites: which data sets, which tasks and which models, read from YAML into frozen models (see docs/evaluation.md)."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mmkd.base.config import SUITES, Frozen, filled, merged, read_mapping, user_roots, validated
from mmkd.base.errors import ConfigError
from mmkd.evaluate.dataset_spec import DatasetSpec, FolderName
from mmkd.evaluate.scoring import BootstrapSettings
from mmkd.evaluate.tasks import Dataset


class Suite(Frozen):
    """Data sets, models and statistics of one evaluation."""

    suite: str
    version: int = 1
    models: tuple[str, ...] | None = None
    """Encoders by their name in the store; by default all of them."""
    ensembles: dict[FolderName, tuple[str, ...]] = Field(default_factory=dict)
    """Name to members, which need not be listed as models."""
    bootstrap: BootstrapSettings = BootstrapSettings()
    datasets: tuple[Dataset, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _share_with_datasets(cls, raw: Any) -> Any:
        """Give the suite's `store`, `settings` and `measures` to every data set, whose own come first."""
        if not isinstance(raw, Mapping):
            return raw
        shared = {key: raw[key] for key in ("store", "settings", "measures") if key in raw}
        own = {key: value for key, value in raw.items() if key not in shared}
        if isinstance(datasets := own.get("datasets"), list | tuple):
            own["datasets"] = [merged(shared, item) if isinstance(item, Mapping) else item for item in datasets]
        return own

    def faults(self) -> Iterator[str]:
        for name, members in self.ensembles.items():
            if len(set(members)) < 2 or len(set(members)) != len(members):
                yield f"ensemble {name} needs two or more different members, got {list(members)}"
        names = sorted(spec.dataset for spec in self.datasets)
        if twice := [name for name, following in pairwise(names) if name == following]:
            yield f"data set {twice[0]!r} stands twice in the suite"
        if clash := set(self.models or ()) & set(self.ensembles):
            yield f"{min(clash)!r} is both a model and an ensemble"

    def dataset(self, name: str) -> DatasetSpec:
        """Return the data set of this name. Raises KeyError if it is not in the suite."""
        found: DatasetSpec = {spec.dataset: spec for spec in self.datasets}[name]
        return found

    def chosen(self, name: str | None) -> tuple[DatasetSpec, ...]:
        """Return the data set of this name, or all. Raises ConfigError if it is not in the suite."""
        found = tuple(spec for spec in self.datasets if name in (None, spec.dataset))
        if not found:
            raise ConfigError(f"no data set {name!r}; the suite has {', '.join(one.dataset for one in self.datasets)}")
        return found

    @cached_property
    def digest(self) -> str:
        """16 hex digits over everything that a score may depend on; not over places, models, ensembles and notes."""
        return hashlib.sha256(json.dumps(shared_content(self), sort_keys=True).encode()).hexdigest()[:16]

    def resample_name(self, dataset: str) -> str:
        """Seed word of a data set's resampling, equal for all models and tasks."""
        return f"{self.suite}/{dataset}/test"


def shared_content(suite: Suite) -> dict[str, Any]:
    """Return what labs that run one suite share, as plain values: data sets by name in `datasets`."""
    places = {"about", "described_in", "source", "store", "notes"}
    own = suite.model_dump(mode="json", exclude={"models", "ensembles", "datasets"})
    found = {}
    for spec in suite.datasets:
        content = spec.model_dump(mode="json", exclude=places)
        if content["prompts"] is not None:
            del content["prompts"]["file"]  # rows and captions of prompts are in the digest of the data
        found[spec.dataset] = content
    return own | {"datasets": found}


def differing_keys(one: Suite, other: Suite) -> list[str]:
    """Name the keys, down to those of data sets, that two suites have unlike values of."""
    left, right = shared_content(one), shared_content(other)
    found = [f"{key} {left[key]!r} and {right[key]!r}" for key in left if key != "datasets" and left[key] != right[key]]
    ours, theirs = left["datasets"], right["datasets"]
    found += [f"data set {name} is in one only" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        found += [f"{key} of {name}" for key, value in ours[name].items() if value != theirs[name][key]]
    return found


def load_suite(path: str | Path) -> Suite:
    """Read a suite file, or the suite of this name that comes with mmkd (`quick`, `biomed`); paths in it are relative
    to the file, `${name}` is a root of the user's. Raises ConfigError, which names the key, if it is not a suite."""
    source = Path(path)
    if not (source.exists() or source.suffix or len(source.parts) > 1):
        if source.name not in shipped_suites():
            known = ", ".join(shipped_suites())
            raise ConfigError(f"cannot read {source}: no such file, and no suite of mmkd's ({known})")
        source = SUITES / source.name / "suite.yaml"
    raw = read_mapping(source)
    roots = user_roots()
    store = raw.pop("store", None)
    if isinstance(raw.get("datasets"), list):
        raw["datasets"] = [spec for item in raw["datasets"] for spec in _dataset_entries(source, item, roots)]
        for entry in raw["datasets"]:
            own = entry.pop("store", store) if isinstance(entry, dict) else None
            if isinstance(own, str):
                place = source if own is store else Path(str(entry.get("described_in") or source))
                own = _beside(place, filled(own, roots | {"dataset": str(entry.get("dataset"))}, place))
            if own is not None:
                entry["store"] = own
    return validated(Suite, raw, source)


def shipped_suites() -> list[str]:
    return sorted(file.parent.name for file in SUITES.glob("*/suite.yaml"))


def _dataset_entries(source: Path, item: object, roots: dict[str, str]) -> list[Any]:
    if isinstance(item, dict) and "source" in item:
        raise ConfigError(
            f"{source}: {item.get('dataset')} has a `source`; write the data set into a file of its own, "
            "which `mmkd extract` can be given"
        )
    if not isinstance(item, str):
        return [item]
    pattern = Path(source.parent.resolve(), filled(item, roots, source))
    files = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    if not files:
        raise ConfigError(f"{source}: no data set file matches {item!r}; name files relative to the suite")
    entries = []
    for file in files:
        entry = read_mapping(file)
        prompts = entry.get("prompts")
        if isinstance(prompts, dict) and isinstance(prompts.get("file"), str):
            entry["prompts"] = prompts | {"file": _beside(file, filled(prompts["file"], roots, file))}
        entries.append(entry | {"described_in": str(file)})
    return entries


def _beside(source: Path, path: str) -> str:
    return path if "://" in path else str((source.parent / Path(path).expanduser()).resolve())
