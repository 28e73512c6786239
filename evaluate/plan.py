"""The plan: every unit of a suite with the identity under which its result is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mmkd.base.config import Frozen
from mmkd.base.errors import ConfigError, NotAStoreError
from mmkd.base.files import write_atomically
from mmkd.base.text import one_line
from mmkd.evaluate.dataset import DatasetRows, load_dataset
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.results import failure
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.task import Unit, Variant
from mmkd.evaluate.tasks import TASKS
from mmkd.store import FeatureStore

PLANS = "plans"
"""Folder of the plans, one for each suite that was run."""
LONGEST = 150
"""Letters of a file name that a suite's name may take."""

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
    """Reason it cannot run; empty if it can."""

    @property
    def unit(self) -> Unit:
        """Unit to run."""
        return Unit(self.dataset, self.task, self.model, Variant(self.head, self.fraction, self.seed))

    @property
    def predictions(self) -> str:
        """Path of the per-sample file below the output folder. The key in it keeps old files from being overwritten."""
        variant = "".join(f"-{part}" for part in (self.head, f"{self.fraction:g}-{self.seed}") if part)
        return f"predictions/{self.dataset}/{self.task}/{self.model}{variant}.{self.key}.parquet"


class Plan(Frozen):
    """The units of the last run of a suite: tables show these and no others."""

    suite: Suite
    models: tuple[str, ...]
    """Rows of the tables, ensembles last."""
    units: tuple[PlannedUnit, ...]
    absent: tuple[str, ...] = ()
    """Data sets without a store: nothing of them was extracted yet, so that they have no units and no scores."""


@dataclass(frozen=True)
class Loaded:
    """A plan with the data sets and features that running it needs, opened on first use."""

    plan: Plan
    stores: dict[str, FeatureStore] = field(default_factory=dict)
    """By path."""
    data: dict[str, DatasetRows] = field(default_factory=dict)
    features: dict[tuple[str, str], Features] = field(default_factory=dict)
    """By (data set, model)."""

    def rows_of(self, dataset: str) -> DatasetRows:
        """Return the rows of a data set. Raises StoreError, UserError as `load_dataset`."""
        if dataset not in self.data:
            self.data[dataset] = load_dataset(self.plan.suite.dataset(dataset), self._store_of(dataset))
        return self.data[dataset]

    def features_of(self, dataset: str, model: str) -> Features:
        """Return the features of a model or an ensemble. Raises StoreError if the store has no such encoder."""
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
    """Open the stores and list the units. Units that cannot run are listed with the reason. Raises ConfigError for a
    primary metric that does not exist, or an ensemble named like an encoder of a store. Raises StoreError if there is
    no store at all, or one cannot be opened."""
    stores, closed = open_stores(suite)
    if not stores:
        raise next(iter(closed.values()))
    models = model_names(suite, list(stores.values()))
    present = [spec for spec in suite.datasets if spec.store in stores]
    absent = tuple(spec.dataset for spec in suite.datasets if spec not in present)
    loaded = Loaded(Plan(suite=suite, models=models, units=(), absent=absent), stores)
    units: list[PlannedUnit] = []
    for spec in present:
        problem = _problem(loaded.rows_of, spec.dataset)
        for model in models:
            reason = problem or _problem(loaded.features_of, spec.dataset, model)
            for task in spec.tasks:
                units += _task_units(loaded, spec, task, model, reason)
    return replace(loaded, plan=loaded.plan.model_copy(update={"units": tuple(units)}))


def open_stores(suite: Suite) -> tuple[dict[str, FeatureStore], dict[str, NotAStoreError]]:
    """Return the stores of a suite by path, and why others cannot be opened: nothing was extracted into them yet.
    Raises StoreError if a store is there and cannot be opened."""
    stores: dict[str, FeatureStore] = {}
    closed: dict[str, NotAStoreError] = {}
    for path in dict.fromkeys(spec.store for spec in suite.datasets):
        try:
            stores[path] = FeatureStore.open(path)
        except NotAStoreError as error:
            closed[path] = error
    return stores, closed


def model_names(suite: Suite, stores: list[FeatureStore]) -> tuple[str, ...]:
    """Return the models in the order of the suite, or all encoders of the stores; then the ensembles. Raises
    ConfigError if an ensemble has the name of an encoder."""
    encoders = dict.fromkeys(slug for store in stores for slug in store.teachers)
    clash = [name for name in suite.ensembles if name in encoders]
    if clash:
        raise ConfigError(f"ensemble {clash[0]!r} has the name of an encoder in the store; name it otherwise")
    return (*(suite.models or tuple(encoders)), *suite.ensembles)


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan beside the results, replacing the suite's last plan. Raises StoreError if the disk is full or
    read-only."""
    write_atomically(plan_path(out, plan.suite.suite), (plan.model_dump_json(indent=1) + "\n").encode())


def read_plan(out: Path, suite: str | None = None) -> Plan:
    """Read the plan of a suite, or of the only one, in an output folder. Raises ConfigError if nothing was run into
    this folder, or by another version, or several suites and none is named."""
    paths = sorted((out / PLANS).glob("*.json")) if suite is None else [plan_path(out, suite)]
    if len(paths) > 1:
        raise ConfigError(f"{out} has results of {len(paths)} suites, {', '.join(_suites_of(out))}; name one")
    if not paths or not paths[0].is_file():
        others = ", ".join(map(repr, _suites_of(out)))
        what = f"no results of suite {suite!r}, only of {others}" if suite and others else "no results"
        raise ConfigError(f"{out} has {what}; `mmkd evaluate run SUITE --out {out}` makes them")
    return _plan_at(paths[0])


def plan_path(out: Path, suite: str) -> Path:
    """Return the suite's own file, whatever its name: characters that files cannot have are percent-encoded. A name too
    long for a file is cut and ends with its digest."""
    name = quote(suite, safe=" ")
    return out / PLANS / f"{name if len(name) <= LONGEST else f'{name[:LONGEST]}-{_digest(suite)}'}.json"


def _suites_of(out: Path) -> list[str]:
    """Return names of the suites that were run into a folder, sorted by file."""
    return [one_line(_plan_at(path).suite.suite) for path in sorted((out / PLANS).glob("*.json"))]


def _plan_at(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path}: {error.errors()[0]['msg']}; run the suite again") from error


def _problem(work: Callable[..., object], *names: str) -> str:
    """Return the reason a data set or encoder cannot be opened; only its units fail with it (see `run_unit`)."""
    try:
        work(*names)
    except Exception as error:  # noqa: BLE001 - the boundary of a unit begins where its data are opened
        return failure(error)
    return ""


def _task_units(loaded: Loaded, spec: DatasetSpec, name: str, model: str, reason: str) -> list[PlannedUnit]:
    """Return the units of one task and model on one data set."""
    suite = loaded.plan.suite
    task = TASKS[name]
    task.scoring(spec)  # a primary metric that does not exist is an error of the suite, not of a unit
    digests = {"features_digest": "", "data_digest": ""}
    if not reason:
        rows = loaded.rows_of(spec.dataset)
        digests = {
            "features_digest": loaded.features_of(spec.dataset, model).digest(rows_used(rows)),
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
    """Return the resampling seed of a data set, equal for all models and tasks."""
    return f"{suite.suite}/{dataset}/test"


def rows_used(data: DatasetRows) -> NDArray[np.int64]:
    """Return the grid rows of all splits and prompts, ascending: a unit depends on their features."""
    return np.unique(np.concatenate([samples.rows for samples in data.parts.values()]))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
