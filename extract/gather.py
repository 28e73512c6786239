"""Tasks out to the cluster, reports back; what takes workers down is done again behind a guard, then set aside."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from distributed import Client, Future, KilledWorker, as_completed

from mmkd.extract.plan import ShardTask
from mmkd.extract.shard_report import ShardReport
from mmkd.extract.worker import run_task
from mmkd.store import MmkdError
from mmkd.store.errors import UserError
from mmkd.store.record import StoreRecord
from mmkd.store.remote import StorePath

_RETRIES = 2
"""Of a task that raised: a fault of the machine goes away, one of the code comes again."""


@dataclass(frozen=True)
class LostShard:
    """A shard that could not be done; the others went on."""

    shard: int
    reason: str


def gather(
    client: Client, root: StorePath, record: StoreRecord, tasks: Sequence[ShardTask], say: Callable[[str], None]
) -> Generator[ShardReport | LostShard, None, None]:
    """Do the tasks and yield what became of each, as they finish. The scheduler holds one small report a task.

    Raises:
        UserError: the scheduler went away.
        MmkdError: what a worker met and the user can mend: a full disk, a teacher that cannot be loaded.
    """

    def submit(task: ShardTask) -> Future:
        kind = "guarded" if task.guarded else "shard"
        return client.submit(run_task, root, record, task, key=f"{kind}-{task.shard:05d}", pure=False, retries=_RETRIES)

    waiting = {submit(task): task for task in tasks}
    finished = as_completed(waiting)
    for future in finished:
        task = waiting.pop(future)
        if future.status in ("cancelled", "lost"):
            raise UserError(
                f"the Dask scheduler at {client.scheduler.address} went away; what was finished is kept: "
                "run the same command again to go on"
            )
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker) and not task.guarded:
            say(f"shard {task.shard} took its worker down: once more, each image decoded in a process of its own")
            again = submit(replace(task, guarded=True))
            waiting[again] = replace(task, guarded=True)
            finished.add(again)
        elif error is not None:
            yield LostShard(task.shard, _in_a_line(error))
        else:
            result = future.result()
            if isinstance(result, MmkdError):
                raise result
            yield result
        future.release()


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return "its workers died or hung; too little memory, or a fault in a teacher?"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
