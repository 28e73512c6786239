"""Units beside each other, each in a process of its own with one thread: the numbers do not depend on how many."""

from __future__ import annotations

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

from mmkd.evaluate.plan import Loaded, Plan, PlannedUnit
from mmkd.evaluate.results import ResultRow
from mmkd.evaluate.unit import failed_row, run_unit

SECONDS_HERE = 4.0
"""So long units run in the calling process first: a small suite is done before other processes have imported what
they need (two seconds; three with PyTorch)."""

Finished = tuple[PlannedUnit, list[ResultRow]]


def run_units(loaded: Loaded, units: Sequence[PlannedUnit], out: Path, jobs: int) -> Iterator[Finished]:
    """Run units, `jobs` at once, and yield the result lines of each as it ends.

    A process that dies (no memory left) costs the unit that it dies of, not the others.

    Args:
        loaded: the plan they belong to.
        units: what to run.
        out: folder that predictions are written below.
        jobs: processes; with 1 all run in this one.

    Raises:
        StoreError: predictions cannot be written.
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
    """Run what waits until all is done or a process dies: what was in hand then is in `lost`, the rest still waits."""
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
    """Once more what a dead process had in hand, so that the unit it died of is known."""
    with _pool(loaded.plan, 1) as pool:
        try:
            return pool.submit(_run, planned, out).result()
        except BrokenProcessPool:
            return [failed_row(loaded, planned, "its process died, twice; too little memory? Try fewer --jobs")]


def _pool(plan: Plan, processes: int) -> ProcessPoolExecutor:
    """Fresh processes: a fork of a program with threads (Arrow's, BLAS') may stand still for ever."""
    lean = plan.model_copy(update={"units": ()})
    return ProcessPoolExecutor(processes, get_context("spawn"), _begin, (lean,))


_loaded: Loaded | None = None


def _begin(plan: Plan) -> None:
    """What a process does first: end with the one that started it, however that ends."""
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
