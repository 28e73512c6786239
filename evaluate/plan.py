"""The plan: every unit of a suite with the identity under which its result is stored."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from mmkd.base.config import Frozen
from mmkd.base.errors import ConfigError, NotAStoreError
from mmkd.base.text import one_line
from mmkd.evaluate.dataset import DatasetRows, load_dataset
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.results import failure
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.task import Unit
from mmkd.evaluate.tasks import TASKS
from mmkd.store import FeatureStore, MmkdError

PLANS = "plans"
"""Folder of the plans, one for each suite that was run."""
NOT_IN_THE_NUMBERS = (
    "dataset", "about", "described_in", "source", "store", "modality", "role", "tasks", "settings", "notes",
)  # fmt: skip
"""Keys of a data set that no score depends on; settings and sections enter by their own task's alone."""


class Plan(Frozen):
    """The units of the last run of a suite: tables show these and no others."""

    suite: Suite
    models: tuple[str, ...]
    """Rows of the tables, ensembles last."""
    units: tuple[Unit, ...]
    absent: tuple[str, ...] = ()
    """Data sets without a store: nothing of them was extracted yet, so that they have no units and no scores."""


@dataclass(frozen=True)
class Loaded:
    """A plan with the stores (by path), data sets and features (by data set and model) that it needs, opened on use."""

    plan: Plan
    stores: dict[str, FeatureStore] = field(default_factory=dict)
    data: dict[str, DatasetRows] = field(default_factory=dict)
    features: dict[tuple[str, str], Features] = field(default_factory=dict)

    def rows_of(self, dataset: str) -> DatasetRows:
        if dataset not in self.data:
            self.data[dataset] = load_dataset(self.plan.suite.dataset(dataset), self._store_of(dataset))
        return self.data[dataset]

    def features_of(self, dataset: str, model: str) -> Features:
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
    """Open the stores and list the units, those that cannot run with the reason. Raises ConfigError for an unknown
    primary metric, or an ensemble named like an encoder; StoreError if there is no store, or one cannot be opened."""
    stores, unopened = open_stores(suite)
    for error in unopened.values():
        if not stores or not isinstance(error, NotAStoreError):
            raise error
    models = model_names(suite, list(stores.values()))
    present = [spec for spec in suite.datasets if spec.store in stores]
    absent = tuple(spec.dataset for spec in suite.datasets if spec not in present)
    loaded = Loaded(Plan(suite=suite, models=models, units=(), absent=absent), stores)
    units: list[Unit] = []
    for spec in present:
        problem = _problem(loaded.rows_of, spec.dataset)
        for model in models:
            reason = problem or _problem(loaded.features_of, spec.dataset, model)
            for task in spec.tasks:
                units += _task_units(loaded, spec, task, model, reason)
    return replace(loaded, plan=loaded.plan.model_copy(update={"units": tuple(units)}))


def open_stores(suite: Suite) -> tuple[dict[str, FeatureStore], dict[str, MmkdError]]:
    """Return the stores of a suite by path, and why others cannot be opened."""
    stores: dict[str, FeatureStore] = {}
    unopened: dict[str, MmkdError] = {}
    for path in dict.fromkeys(spec.store for spec in suite.datasets):
        try:
            stores[path] = FeatureStore.open(path)
        except MmkdError as error:
            unopened[path] = error
    return stores, unopened


def model_names(suite: Suite, stores: list[FeatureStore]) -> tuple[str, ...]:
    """Return the models in the order of the suite, or all encoders of the stores; then the ensembles. Raises
    ConfigError if an ensemble has the name of an encoder."""
    encoders = dict.fromkeys(slug for store in stores for slug in store.teachers)
    if clash := [name for name in suite.ensembles if name in encoders]:
        raise ConfigError(f"ensemble {clash[0]!r} has the name of an encoder in the store; name it otherwise")
    return (*(suite.models or tuple(encoders)), *suite.ensembles)


def read_plan(out: Path, suite: str | None = None) -> Plan:
    """Read the plan of a suite, or of the only one, in an output folder. Raises ConfigError if nothing was run into it,
    or by another version, or several suites and none is named."""
    paths = sorted((out / PLANS).glob("*.json"))
    wanted = paths if suite is None else [path for path in paths if path == plan_path(out, suite)]
    plans = []
    for path in wanted or paths:
        try:
            plans.append(Plan.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            raise ConfigError(f"{path}: {error.errors()[0]['msg']}; run the suite again") from error
    names = [one_line(plan.suite.suite) for plan in plans]
    if len(wanted) > 1:
        raise ConfigError(f"{out} has results of {len(names)} suites, {', '.join(names)}; name one")
    if not wanted:
        what = f"no results of suite {suite!r}, only of {', '.join(map(repr, names))}" if names else "no results"
        raise ConfigError(f"{out} has {what}; `mmkd evaluate run SUITE --out {out}` makes them")
    return plans[0]


def plan_path(out: Path, suite: str) -> Path:
    """Return the suite's own file, percent-encoded; a name too long for a file is cut and ends with its digest."""
    name = quote(suite, safe=" ")
    return out / PLANS / f"{name if len(name) <= 150 else f'{name[:150]}-{_digest(suite)}'}.json"


def _problem(work: Callable[..., object], *names: str) -> str:
    try:
        work(*names)
    except Exception as error:  # noqa: BLE001 - the boundary of a unit begins where its data are opened
        return failure(error)
    return ""


def _task_units(loaded: Loaded, spec: DatasetSpec, name: str, model: str, reason: str) -> list[Unit]:
    suite, task = loaded.plan.suite, TASKS[name]
    task.scoring(spec)  # a primary metric that does not exist is an error of the suite, not of a unit
    digests = {"features_digest": "", "data_digest": ""}
    if not reason:
        data = loaded.rows_of(spec.dataset)
        digests["features_digest"] = loaded.features_of(spec.dataset, model).digest(data.rows_used)
        digests["data_digest"] = data.digest
    left_out: dict[str, Any] = dict.fromkeys((*NOT_IN_THE_NUMBERS, *(set(spec.sections) - {name})), True)
    described = {
        "dataset": spec.model_dump(mode="json", exclude=left_out | {"prompts": {"file"}}),
        "settings": task.own(spec).model_dump(mode="json", exclude={"primary"}),
        "bootstrap": suite.bootstrap.model_dump(mode="json"),
        "resampled": suite.resample_name(spec.dataset),
        "task_version": task.version,
    }
    config = _digest(described)
    units = []
    for variant in task.variants(spec):
        identity = {"dataset": spec.dataset, "task": name, "model": model} | asdict(variant)
        key = _digest(identity | digests | {"config": config})
        units.append(Unit(key=key, reason=reason, config_digest=config, **identity, **digests))
    return units


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
