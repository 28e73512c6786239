"""Send tasks to the cluster and gather reports; a shard that kills its workers is done again alone, then set aside."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from distributed import Client, KilledWorker, as_completed

from mmkd.base.errors import UserError
from mmkd.extract.plan import ShardTask
from mmkd.extract.report import ShardReport
from mmkd.extract.worker import run_task
from mmkd.store import MmkdError
from mmkd.store.record import Store

_RETRIES = 2
"""Further attempts at a task that raised: a fault of the machine passes, one of the code recurs."""


@dataclass(frozen=True)
class LostShard:
    """A shard that could not be done; the others went on."""

    shard: int
    reason: str


def gather(
    client: Client, store: Store, tasks: Sequence[ShardTask], say: Callable[[str], None]
) -> Generator[ShardReport | LostShard, None, None]:
    """Do the tasks and yield the outcome of each as it finishes. The scheduler keeps one small report per task. Dask
    blames a dead worker for all its tasks, running and waiting. Tasks blamed too often are therefore done again when
    the others have finished, one shard at a time, so that each is blamed for itself alone. Raises UserError if the
    scheduler went away. Raises MmkdError for a fault in a worker that the user can correct: a full disk, a teacher that
    cannot be loaded."""
    blamed = []
    for task, outcome in _outcomes(client, store, tasks):
        if isinstance(outcome, KilledWorker):
            say(
                f"shard {task.shard} was in hand when its workers died: once more at the end, by itself, "
                "each image decoded in a process of its own"
            )
            blamed.append(replace(task, isolated=True))
        else:
            yield _result(task, outcome)
    for isolated in blamed:
        for task, outcome in _outcomes(client, store, [isolated]):
            yield _result(task, outcome)


def _outcomes(
    client: Client, store: Store, tasks: Sequence[ShardTask]
) -> Iterator[tuple[ShardTask, ShardReport | BaseException]]:
    keys = [f"{'isolated' if task.isolated else 'shard'}-{task.shard:05d}" for task in tasks]
    by_key = dict(zip(keys, tasks, strict=True))
    # One graph: Dask then knows that there are many, and hands a worker no more than it has threads for.
    futures = client.map(partial(run_task, store), tasks, key=keys, pure=False, retries=_RETRIES)
    for future in as_completed(futures):
        if future.status in ("cancelled", "lost"):
            raise UserError(
                f"the Dask scheduler at {client.scheduler.address} went away; what was finished is kept: "
                "run the same command again to go on"
            )
        outcome = future.exception() if future.status == "error" else future.result()
        if isinstance(outcome, MmkdError) and future.status != "error":
            raise outcome
        yield by_key[future.key], outcome
        future.release()


def _result(task: ShardTask, outcome: ShardReport | BaseException) -> ShardReport | LostShard:
    if not isinstance(outcome, BaseException):
        return outcome
    if isinstance(outcome, KilledWorker):
        return LostShard(task.shard, "its workers died or hung; too little memory, or a fault in a teacher?")
    text = " ".join(str(outcome).split())[:200]
    return LostShard(task.shard, f"{type(outcome).__name__}: {text}" if text else type(outcome).__name__)
