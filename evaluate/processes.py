"""Units, run here or in processes of their own with one thread each: the numbers do not depend on how many."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped] # a dependency of scikit-learn

from mmkd.base.files import write_atomically
from mmkd.evaluate.plan import Loaded, Plan, PlannedUnit, resample_name
from mmkd.evaluate.predictions import Predictions, encode_predictions
from mmkd.evaluate.results import ResultRow, code_digest, failure, number
from mmkd.evaluate.statistics import resampled
from mmkd.evaluate.tasks import TASKS
from mmkd.store import MmkdError

SECONDS_HERE = 4.0
"""So long units run in the calling process first: a small suite is done before other processes have imported what
they need (two seconds; three with PyTorch)."""

Finished = tuple[PlannedUnit, list[ResultRow]]


def run_units(loaded: Loaded, units: Sequence[PlannedUnit], out: Path, jobs: int) -> Iterator[Finished]:
    """Run units, `jobs` at once, and yield the result lines of each as it ends. A process that dies (no memory left)
    fails only its current unit. Raises StoreError if predictions cannot be written.

    Args:
        loaded: the plan they belong to.
        units: what to run.
        out: folder that predictions are written below.
        jobs: processes; with 1 all run in this one.
    """
    waiting = deque(units)
    until = time.monotonic() + SECONDS_HERE
    while waiting and (jobs == 1 or time.monotonic() < until):
        planned = waiting.popleft()
        yield planned, run_unit(loaded, planned, out)
    while waiting:
        lost: list[PlannedUnit] = []
        yield from _in_processes(loaded.plan, waiting, lost, (out, jobs))
        for planned in lost:
            yield planned, _alone(loaded, planned, out)


def _in_processes(
    plan: Plan, waiting: deque[PlannedUnit], lost: list[PlannedUnit], how: tuple[Path, int]
) -> Iterator[Finished]:
    """Run waiting units until all are done or a process dies; its units are then in `lost`."""
    out, jobs = how
    with _pool(plan, min(jobs, len(waiting))) as pool:
        running: dict[Future[list[ResultRow]], PlannedUnit] = {}
        while (waiting or running) and not lost:
            while waiting and len(running) < jobs and not lost:
                planned = waiting.popleft()
                try:
                    running[pool.submit(_run, planned, out)] = planned
                except BrokenProcessPool:
                    lost.append(planned)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                planned = running.pop(future)
                try:
                    rows = future.result()
                except BrokenProcessPool:
                    lost.append(planned)
                else:
                    yield planned, rows
        lost += running.values()


def _alone(loaded: Loaded, planned: PlannedUnit, out: Path) -> list[ResultRow]:
    """Rerun the units of a dead process one by one to find the one that kills it."""
    with _pool(loaded.plan, 1) as pool:
        try:
            return pool.submit(_run, planned, out).result()
        except BrokenProcessPool:
            return [failed_row(loaded, planned, "its process died, twice; too little memory? Try fewer --jobs")]


def _pool(plan: Plan, processes: int) -> ProcessPoolExecutor:
    """Return a pool of spawned processes: a fork with threads (Arrow's, BLAS') may deadlock."""
    lean = plan.model_copy(update={"units": ()})
    return ProcessPoolExecutor(processes, get_context("spawn"), _begin, (lean,))


_loaded: Loaded | None = None


def _begin(plan: Plan) -> None:
    """Process initializer: exit when the parent exits for any reason."""
    global _loaded  # noqa: PLW0603 (what a pool's process keeps between its tasks can only be a global)
    _loaded = Loaded(plan)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(planned: PlannedUnit, out: Path) -> list[ResultRow]:
    assert _loaded is not None, "the pool's initializer has run"
    return run_unit(_loaded, planned, out)


def run_unit(loaded: Loaded, planned: PlannedUnit, out: Path) -> list[ResultRow]:
    """Run a unit and write its predictions below `out`; the lines are the caller's to append. The boundary of a unit:
    any error makes one line with status `failed` and the reason, so that it fails no other unit. Raises StoreError if
    predictions cannot be written."""
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
    """Return the line of a unit without a result."""
    return _row(loaded, planned, status="failed", reason=reason)


@functools.cache
def _threads() -> ThreadpoolController:
    """Return the BLAS and OpenMP libraries of this process, to compute with one thread each. The last digit then does
    not depend on the number of cores, and units divide better than steps: measured on two cores, one thread fits a
    logistic regression 5 to 10 times faster than two, for 300 x 16 up to 20,000 x 512 features. Finding the libraries
    takes longer than a small fit, hence once."""
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
    """Return a result row: the unit's identity and its result."""
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
