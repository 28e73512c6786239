"""The plan: every unit of a suite with the identity under which its result is stored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mmkd.base.config import Frozen
from mmkd.base.errors import ConfigError, NotAStoreError
from mmkd.base.files import write_atomically
from mmkd.evaluate.dataset import DatasetRows, load_dataset
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.task import Unit, Variant
from mmkd.evaluate.tasks import TASKS
from mmkd.store import FeatureStore, MmkdError

PLAN = "plan.json"

NOT_IN_THE_NUMBERS: dict[str, Any] = {
    **dict.fromkeys(("dataset", "about", "described_in", "source", "store"), True),
    **dict.fromkeys(("modality", "role", "tasks", "settings", "notes"), True),
    "prompts": {"file"},
}
"""Keys of a data set that no score depends on; settings and sections enter by
their own task's alone, prompts by their rows."""


class PlannedUnit(Frozen):
    """A unit as the plan file lists it."""

    key: str
    dataset: str
    task: str
    model: str
    head: str
    fraction: float
    seed: int
    features_digest: str = ""
    data_digest: str = ""
    config_digest: str = ""
    reason: str = ""
    """Why it cannot be run; empty where it can."""

    @property
    def unit(self) -> Unit:
        """What to run."""
        return Unit(self.dataset, self.task, self.model, Variant(self.head, self.fraction, self.seed))

    @property
    def predictions(self) -> str:
        """Path of the per-sample file below the output folder. The key in it keeps old files from being overwritten."""
        variant = "".join(f"-{part}" for part in (self.head, f"{self.fraction:g}-{self.seed}") if part)
        return f"predictions/{self.dataset}/{self.task}/{self.model}{variant}.{self.key}.parquet"


class Plan(Frozen):
    """What the last run of an output folder was asked to do: tables show these units and no others."""

    suite: Suite
    models: tuple[str, ...]
    """Rows of the tables, ensembles last."""
    units: tuple[PlannedUnit, ...]
    absent: tuple[str, ...] = ()
    """Data sets without a store: nothing of them was extracted yet, so that they have no units and no scores."""


@dataclass(frozen=True)
class Loaded:
    """A plan with the data sets and features that running it needs, opened when they are first asked for."""

    plan: Plan
    stores: dict[str, FeatureStore] = field(default_factory=dict)
    """By path."""
    data: dict[str, DatasetRows] = field(default_factory=dict)
    features: dict[tuple[str, str], Features] = field(default_factory=dict)
    """By (data set, model)."""

    def rows_of(self, dataset: str) -> DatasetRows:
        """The rows of a data set.

        Raises:
            StoreError, UserError: as `load_dataset`.
        """
        if dataset not in self.data:
            self.data[dataset] = load_dataset(self.plan.suite.dataset(dataset), self._store_of(dataset))
        return self.data[dataset]

    def features_of(self, dataset: str, model: str) -> Features:
        """The features of a model or an ensemble.

        Raises:
            StoreError: the store has no such encoder.
        """
        if (dataset, model) not in self.features:
            members = self.plan.suite.ensembles.get(model, ())
            self.features[dataset, model] = Features(self._store_of(dataset), model, members)
        return self.features[dataset, model]

    def _store_of(self, dataset: str) -> FeatureStore:
        path = self.plan.suite.dataset(dataset).store
        if path not in self.stores:
            self.stores[path] = FeatureStore.open(path)
        return self.stores[path]


def make_plan(suite: Suite) -> Loaded:
    """Open the stores and list the units. What cannot be run is listed with its reason.

    Raises:
        ConfigError: a primary metric that does not exist, or an ensemble named like an encoder of a store.
        StoreError: there is no store at all, or one cannot be opened.
    """
    stores, closed = open_stores(suite)
    if not stores:
        raise next(iter(closed.values()))
    models = model_names(suite, list(stores.values()))
    present = [spec for spec in suite.datasets if spec.store in stores]
    absent = tuple(spec.dataset for spec in suite.datasets if spec not in present)
    loaded = Loaded(Plan(suite=suite, models=models, units=(), absent=absent), stores)
    units: list[PlannedUnit] = []
    for spec in present:
        problem = ""
        try:
            loaded.rows_of(spec.dataset)
        except MmkdError as error:
            problem = str(error)
        for model in models:
            reason = problem
            try:
                loaded.features_of(spec.dataset, model)
            except MmkdError as error:
                reason = reason or str(error)
            for task in spec.tasks:
                units += _task_units(loaded, spec, (task, model), reason)
    return replace(loaded, plan=loaded.plan.model_copy(update={"units": tuple(units)}))


def open_stores(suite: Suite) -> tuple[dict[str, FeatureStore], dict[str, NotAStoreError]]:
    """The stores of a suite by path, and why others cannot be opened: nothing was extracted into them yet.

    Raises:
        StoreError: a store is there and cannot be opened.
    """
    stores: dict[str, FeatureStore] = {}
    closed: dict[str, NotAStoreError] = {}
    for path in dict.fromkeys(spec.store for spec in suite.datasets):
        try:
            stores[path] = FeatureStore.open(path)
        except NotAStoreError as error:
            closed[path] = error
    return stores, closed


def model_names(suite: Suite, stores: list[FeatureStore]) -> tuple[str, ...]:
    """Models in the order of the suite, or all encoders of the stores; then the ensembles.

    Raises:
        ConfigError: an ensemble has the name of an encoder.
    """
    encoders = dict.fromkeys(slug for store in stores for slug in store.teachers)
    clash = [name for name in suite.ensembles if name in encoders]
    if clash:
        raise ConfigError(f"ensemble {clash[0]!r} has the name of an encoder in the store; name it otherwise")
    return (*(suite.models or tuple(encoders)), *suite.ensembles)


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan beside the results.

    Raises:
        StoreError: the disk is full or read-only.
    """
    write_atomically(out / PLAN, (plan.model_dump_json(indent=1) + "\n").encode())


def read_plan(out: Path) -> Plan:
    """Read the plan of an output folder.

    Raises:
        ConfigError: nothing was run into this folder, or by another version.
    """
    path = out / PLAN
    if not path.is_file():
        raise ConfigError(f"{out} holds no {PLAN}; `mmkd evaluate run SUITE --out {out}` fills it")
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path}: {error.errors()[0]['msg']}; run the suite again") from error


def _task_units(loaded: Loaded, spec: DatasetSpec, names: tuple[str, str], reason: str) -> list[PlannedUnit]:
    """The units of one task and model on one data set."""
    (name, model), suite = names, loaded.plan.suite
    task = TASKS[name]
    task.scoring(spec)  # a primary metric that does not exist is an error of the suite, not of a unit
    digests = {"features_digest": "", "data_digest": ""}
    if not reason:
        rows = loaded.rows_of(spec.dataset)
        digests = {
            "features_digest": loaded.features_of(spec.dataset, model).digest(_rows_used(rows)),
            "data_digest": rows.digest,
        }
    described = {
        "dataset": spec.model_dump(
            mode="json", exclude=NOT_IN_THE_NUMBERS | dict.fromkeys(set(spec.sections) - {name}, True)
        ),
        "settings": task.own(spec).model_dump(mode="json", exclude={"primary"}),
        "bootstrap": suite.bootstrap.model_dump(mode="json"),
        "resampled": resample_name(suite, spec.dataset),
        "task_version": task.version,
    }
    config = _digest(described)
    units = []
    for variant in task.variants(spec):
        identity = {
            "dataset": spec.dataset, "task": name, "model": model,
            "head": variant.head, "fraction": variant.fraction, "seed": variant.seed,
        }  # fmt: skip
        key = _digest(identity | digests | {"config": config})
        units.append(PlannedUnit(key=key, reason=reason, config_digest=config, **identity, **digests))
    return units


def resample_name(suite: Suite, dataset: str) -> str:
    """What seeds the resamples of a data set, the same for all models and tasks."""
    return f"{suite.suite}/{dataset}/test"


def _rows_used(data: DatasetRows) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.unique(np.concatenate([samples.rows for samples in data.parts.values()]))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
