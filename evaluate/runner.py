"""Running a suite: finished units are skipped, failures are recorded, the rest goes on."""

import functools
import importlib.metadata
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped] # a dependency of scikit-learn

from mmkd.base.errors import ConfigError
from mmkd.base.files import disk_errors, write_atomically
from mmkd.base.lock import lock_until_closed
from mmkd.base.text import counted, one_line, plain_values
from mmkd.evaluate.plan import Loaded, Plan, make_plan, plan_path
from mmkd.evaluate.predictions import Predictions, encode_predictions
from mmkd.evaluate.results import ResultRow, append_results, code_digest, failure, read_results
from mmkd.evaluate.splits import small_subgroups
from mmkd.evaluate.statistics import resampled
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.task import Unit
from mmkd.evaluate.tasks import TASKS
from mmkd.store import MmkdError

SECONDS_HERE = 4.0
"""So long units run in the calling process first: a small suite is done before other processes have imported what
they need (two seconds; three with PyTorch)."""


@dataclass(frozen=True)
class Outcome:
    """status: `ran`, `done` (earlier) or `failed`. warnings: doubts about its values. other_code: done by other sources
    of mmkd.evaluate than those of now."""

    unit: Unit
    status: str
    reason: str = ""
    warnings: tuple[str, ...] = ()
    other_code: bool = False


@dataclass(frozen=True)
class RunReport:
    """absent: data sets of the suite that nothing was extracted of."""

    out: Path
    outcomes: tuple[Outcome, ...]
    absent: tuple[str, ...] = ()

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def __str__(self) -> str:
        text = (
            f"{counted(len(self.outcomes), 'unit')}: {self.count('ran')} run, {self.count('done')} done before, "
            f"{len(self.failed)} failed; results in {self.out}"
        )
        if others := sum(outcome.other_code for outcome in self.outcomes):
            text += f"; {others} of those done before come from another version of the code, --force runs them again"
        doubts = Counter(text for outcome in self.outcomes for text in outcome.warnings)
        text += "".join(f"\nwarning ({counted(n, 'unit')}): {one_line(doubt)}" for doubt, n in doubts.most_common(5))
        if self.absent:
            text += f"\n{len(self.absent)} data sets are not extracted: {', '.join(self.absent)}; `check` says how"
        return text


def run_suite(
    suite: Suite,
    out: Path,
    *,
    selection: bool = False,
    force: bool = False,
    jobs: int = 1,
    progress: Callable[[Outcome, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> RunReport:
    """Run what is missing of a suite. Writes `plans/SUITE.json`, `results.jsonl` (append-only) and `predictions/` into
    `out`. A unit whose features, rows and settings are those of a stored result is not run again; failed units are.
    A second run of the suite into `out` waits for the first. Raises ConfigError if the suite contradicts itself, or
    `selection` with report sets; StoreError if a store cannot be opened, or results cannot be written.

    Args:
        selection: the scores will be used to choose a model: suites with `role: report` sets are refused.
        force: run finished units again; their new rows count.
        jobs: units at once, each in a spawned process with one thread; the numbers do not depend on it. More than one
            needs the usual `if __name__ == "__main__":` of a script.
        progress: called after every unit with its outcome and the number of all units.
        say: called with a line where another run has to end first.
    """
    reported = [spec.dataset for spec in suite.datasets if spec.role == "report"]
    if selection and reported:
        raise ConfigError(
            f"suite {suite.suite!r} is to choose a model, but {reported[0]!r} has role `report`: a score on it would "
            "no longer be honest; choose on sets with `role: monitor`"
        )
    loaded = make_plan(suite)
    units = loaded.plan.units
    outcomes: dict[str, Outcome] = {}

    def note(key: str, outcome: Outcome) -> None:
        outcomes[key] = outcome
        if progress is not None:
            progress(outcome, len(units))

    plan = plan_path(out, suite.suite)
    lock = plan.with_suffix(".lock")
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    with file:
        lock_until_closed(file, lambda: say(f"waiting for another run of {one_line(suite.suite)} into {out} to end"))
        write_atomically(plan, (loaded.plan.model_dump_json(indent=1) + "\n").encode())
        finished = {
            key: rows[0].code_digest
            for key, rows in ({} if force else read_results(out)).items()
            if rows[0].status != "failed" and (out / rows[0].predictions).is_file()
        }
        for planned in units:
            if planned.key in finished:
                note(planned.key, Outcome(planned, "done", other_code=finished[planned.key] != code_digest()))
        for planned, rows in run_units(loaded, [one for one in units if one.key not in finished], out, jobs):
            append_results(out, rows)
            failed = rows[0].status == "failed"
            outcome = Outcome(planned, "failed", rows[0].reason) if failed else Outcome(planned, "ran")
            note(planned.key, replace(outcome, warnings=rows[0].warnings))
    return RunReport(out, tuple(outcomes[planned.key] for planned in units), loaded.plan.absent)


Finished = Iterator[tuple[Unit, list[ResultRow]]]


def run_units(loaded: Loaded, units: Sequence[Unit], out: Path, jobs: int) -> Finished:
    """Run units, `jobs` at once, and yield the result lines of each as it ends. A process that dies (no memory left)
    fails only its current unit. Raises StoreError if predictions cannot be written below `out`."""
    waiting = deque(units)
    until = time.monotonic() + SECONDS_HERE
    while waiting and (jobs == 1 or time.monotonic() < until):
        planned = waiting.popleft()
        yield planned, run_unit(loaded, planned, out)
    while waiting:
        lost: list[Unit] = []
        yield from _in_processes(loaded.plan, waiting, lost, out=out, jobs=jobs)
        for planned in lost:  # one by one, to find the one that killed the process
            with _pool(loaded.plan, 1) as pool:
                try:
                    rows = pool.submit(_run, planned, out).result()
                except BrokenProcessPool:
                    rows = [_failed(loaded, planned, "its process died, twice; too little memory? Try fewer --jobs")]
            yield planned, rows


def _in_processes(plan: Plan, waiting: deque[Unit], lost: list[Unit], *, out: Path, jobs: int) -> Finished:
    """Run waiting units until all are done or a process dies; the units that were running are then in `lost`."""
    with _pool(plan, min(jobs, len(waiting))) as pool:
        running: dict[Future[list[ResultRow]], Unit] = {}
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

    def end_with_parent() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run(planned: Unit, out: Path) -> list[ResultRow]:
    assert _loaded is not None, "the pool's initializer has run"
    return run_unit(_loaded, planned, out)


def run_unit(loaded: Loaded, planned: Unit, out: Path) -> list[ResultRow]:
    """Run a unit, write its predictions below `out` and return its result lines. The boundary of a unit: any error
    makes one line with status `failed` and the reason. Raises StoreError if predictions cannot be written."""
    started = time.perf_counter()
    if planned.reason:
        return [_failed(loaded, planned, planned.reason)]
    try:
        with _threads().limit(limits=1):
            predictions = _predict(loaded, planned)
            rows = _score(loaded, planned, predictions, time.perf_counter() - started)
        data = encode_predictions(predictions)
    except Exception as error:  # noqa: BLE001 - see above
        return [_failed(loaded, planned, failure(error))]
    write_atomically(out / planned.file, data)
    return rows


@functools.cache
def _threads() -> ThreadpoolController:
    """BLAS and OpenMP libraries of this process, to compute with one thread each: the last digit then does not depend
    on the number of cores, and a logistic regression fits 5 to 10 times faster than with two (300 x 16 up to 20,000 x
    512 features). Finding the libraries takes longer than a small fit, hence once."""
    return ThreadpoolController()


def _predict(loaded: Loaded, planned: Unit) -> Predictions:
    data = loaded.rows_of(planned.dataset)
    features = loaded.features_of(planned.dataset, planned.model)
    predictions = TASKS[planned.task].predict(planned.variant, data, features)
    if not predictions.available.any():
        raise MmkdError(f"{planned.model} has features for none of the {len(predictions)} test samples")
    warned = [*predictions.info.get("warnings", ()), *small_subgroups(predictions)]
    return replace(predictions, info=predictions.info | {"warnings": warned}) if warned else predictions


def _score(loaded: Loaded, planned: Unit, predictions: Predictions, seconds: float) -> list[ResultRow]:
    suite = loaded.plan.suite
    scoring = TASKS[planned.task].scoring(suite.dataset(planned.dataset))
    name = suite.resample_name(planned.dataset)
    parts = {"": np.ones(len(predictions), dtype=bool)}
    found = resampled(predictions, scoring.metrics, scoring, bootstrap=suite.bootstrap, name=name, parts=parts)
    rows = []
    for (_, metric), replicates in found.items():
        value, low, high = plain_values([replicates.value, *replicates.interval(suite.bootstrap.level)])
        rows.append(
            _row(
                loaded,
                planned,
                metric=metric,
                value=value,
                ci_low=low,
                ci_high=high,
                n=replicates.n,
                n_missing=replicates.missing,
                n_groups=replicates.groups,
                n_boot=len(replicates.draws),
                status="undefined" if replicates.reason else "ok",
                reason=replicates.reason,
                predictions=planned.file,
                seconds=round(seconds, 4),
                warnings=predictions.info.get("warnings", ()),
            )
        )
    return rows


def _failed(loaded: Loaded, planned: Unit, reason: str) -> ResultRow:
    return _row(loaded, planned, status="failed", reason=reason)


def _row(loaded: Loaded, planned: Unit, **result: object) -> ResultRow:
    suite = loaded.plan.suite
    spec = suite.dataset(planned.dataset)
    identity = planned.model_dump() | {
        "suite": suite.suite,
        "suite_digest": suite.digest,
        "suite_version": suite.version,
        "dataset_version": spec.version,
        "modality": spec.modality,
        "role": spec.role,
        "protocol": TASKS[planned.task].scoring(spec).protocol,
        "boot_seed": suite.bootstrap.seed,
        "code_version": importlib.metadata.version("mmkd"),
        "code_digest": code_digest(),
    }
    return ResultRow.model_validate(identity | result)
