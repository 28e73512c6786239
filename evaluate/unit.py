"""One unit: its predictions, written, and the result lines that follow from them."""

from __future__ import annotations

import functools
import importlib.metadata
import time
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped] # a dependency of scikit-learn

from mmkd.base.files import write_atomically
from mmkd.evaluate.plan import Loaded, PlannedUnit, resample_name
from mmkd.evaluate.predictions import Predictions, encode_predictions
from mmkd.evaluate.results import ResultRow, code_digest, failure, number
from mmkd.evaluate.statistics import resampled
from mmkd.evaluate.tasks import TASKS
from mmkd.store import MmkdError


def run_unit(loaded: Loaded, planned: PlannedUnit, out: Path) -> list[ResultRow]:
    """Run a unit and write its predictions below `out`; the lines are the caller's to append.

    The boundary of a unit: whatever its computation raises makes one line with status `failed` and the reason, so that
    an error that one data set or encoder brings out costs no other unit.

    Raises:
        StoreError: predictions cannot be written.
    """
    started = time.perf_counter()
    if planned.reason:
        return [failed_row(loaded, planned, planned.reason)]
    try:
        with _threads().limit(limits=1):
            predictions = _predict(loaded, planned)
            rows = _score(loaded, planned, predictions, time.perf_counter() - started)
        data = encode_predictions(predictions)
    except Exception as error:  # noqa: BLE001 - see above
        return [failed_row(loaded, planned, failure(error))]
    write_atomically(out / planned.predictions, data)
    return rows


def failed_row(loaded: Loaded, planned: PlannedUnit, reason: str) -> ResultRow:
    """The line of a unit without a result."""
    return _row(loaded, planned, status="failed", reason=reason)


@functools.cache
def _threads() -> ThreadpoolController:
    """The BLAS and OpenMP libraries of this process, to compute with one thread each.

    The last digit then does not depend on the number of cores, and units divide better than steps: measured on two
    cores, one thread fits a logistic regression 5 to 10 times faster than two, for 300 x 16 up to 20,000 x 512
    features. Finding the libraries takes longer than a small fit, hence once.
    """
    return ThreadpoolController()


def _predict(loaded: Loaded, planned: PlannedUnit) -> Predictions:
    data = loaded.rows_of(planned.dataset)
    features = loaded.features_of(planned.dataset, planned.model)
    predictions = TASKS[planned.task].predict(planned.unit.variant, data, features)
    if not predictions.available.any():
        raise MmkdError(f"{planned.model} has features for none of the {len(predictions)} test samples")
    return predictions


def _score(loaded: Loaded, planned: PlannedUnit, predictions: Predictions, seconds: float) -> list[ResultRow]:
    suite = loaded.plan.suite
    scoring = TASKS[planned.task].scoring(suite.dataset(planned.dataset))
    name = resample_name(suite, planned.dataset)
    every_row = {"": np.ones(len(predictions), dtype=bool)}
    found = resampled(predictions, scoring.metrics, scoring, bootstrap=suite.bootstrap, name=name, parts=every_row)
    rows = []
    for (_, metric), replicates in found.items():
        low, high = replicates.interval(suite.bootstrap.level)
        rows.append(
            _row(
                loaded,
                planned,
                metric=metric,
                value=number(replicates.value),
                ci_low=number(low),
                ci_high=number(high),
                n=replicates.n,
                n_missing=replicates.missing,
                n_groups=replicates.groups,
                n_boot=len(replicates.draws),
                status="undefined" if replicates.reason else "ok",
                reason=replicates.reason,
                predictions=planned.predictions,
                seconds=round(seconds, 4),
                warnings=predictions.info.get("warnings", ()),
            )
        )
    return rows


def _row(loaded: Loaded, planned: PlannedUnit, **found: object) -> ResultRow:
    """A result row: the unit's identity, and what was found."""
    suite = loaded.plan.suite
    spec = suite.dataset(planned.dataset)
    nothing = {
        "metric": "", "value": None, "ci_low": None, "ci_high": None, "n": 0, "n_missing": 0, "n_groups": 0,
        "n_boot": 0, "predictions": "", "seconds": 0.0,
    }  # fmt: skip
    identity = {
        "suite": suite.suite,
        "suite_version": suite.version,
        "dataset_version": spec.version,
        "modality": spec.modality,
        "role": spec.role,
        "protocol": TASKS[planned.task].scoring(spec).protocol,
        "boot_seed": suite.bootstrap.seed,
        "code_version": importlib.metadata.version("mmkd"),
        "code_digest": code_digest(),
    }
    return ResultRow.model_validate(nothing | planned.model_dump() | identity | found)
