"""Shards on a Dask cluster: what a worker does with one, and how the client sends them out and gathers the reports. A
shard that kills its workers is done again alone, then set aside."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from distributed import Client, KilledWorker, WorkerPlugin, as_completed, get_worker
from distributed.worker import Worker

from mmkd.base.arithmetic import peak_tflops
from mmkd.base.errors import DeviceError, UserError, cause
from mmkd.base.places.remote import StorePath
from mmkd.base.process import Watch, freeze_loaded_objects, keep_freed_memory, usable_cores
from mmkd.extract.cluster_config import WorkerConfig
from mmkd.extract.decoding import Threads
from mmkd.extract.device import Device, full_device, lost_device, open_device
from mmkd.extract.encode import Workbench
from mmkd.extract.forward import BatchSizes, search_rows
from mmkd.extract.plan import ShardTask
from mmkd.extract.report import ShardReport
from mmkd.extract.shard import extract_shard, retry_shard
from mmkd.extract.teachers import Teacher, TeacherSpec, load_teacher
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.store import MmkdError, TeacherCard
from mmkd.store.ledger import entries_of_shard
from mmkd.store.record import Store
from mmkd.store.samples import read_part

PLUGIN_NAME = "mmkd-teachers"


class TeachersPlugin(WorkerPlugin):  # type: ignore[misc]  # dask has no type hints
    """Loads every teacher when a worker joins. What keeps it from loading one is the answer to its first task."""

    name = PLUGIN_NAME

    def __init__(
        self,
        teachers: Sequence[tuple[TeacherSpec, TeacherCard]],
        settings: WorkerConfig,
        beside: int = 1,
        device: Callable[[], Device] = open_device,
    ) -> None:
        """`beside`: worker processes that share the cores that each of them sees. `device`: opens a worker's device."""
        self.specs = list(teachers)
        self.settings, self.beside, self.device = settings, beside, device
        self.loaded: dict[str, Teacher] = {}
        self.bench: Workbench | None = None
        self.failure: MmkdError | None = None
        self.peak = 0.0, ""

    def setup(self, worker: Worker) -> None:
        settings = self.settings
        try:
            device = self.device()
            if not device.ahead:
                # One thread per process: the split of a matrix product over threads can change its last bit,
                # and processes scale better than threads here anyway.
                torch.set_num_threads(1)
                keep_freed_memory()
            decode = settings.decode_threads or max(1, usable_cores() // self.beside)
            self.bench = Workbench(
                threads=Threads(decode, settings.read_threads or min(32, max(4, 2 * decode))),
                device=device,
                sizes=BatchSizes(settings.batch_rows or device.start_rows),
                watch=Watch(settings.hang_seconds),
            )
            for spec, card in self.specs:
                self.loaded[card.slug] = teacher = _load(spec, card, device)
                if isinstance(teacher, LoadedTeacher):
                    teacher.tune(channels_last=settings.channels_last, compiled=settings.compile)
                if device.ahead and settings.batch_rows is None:
                    speed = [settings.channels_last, settings.compile, self.beside]
                    self.bench.sizes.found |= search_rows(teacher, device, speed)
            half = any(isinstance(one, LoadedTeacher) and one.half for one in self.loaded.values())
            self.peak = peak_tflops(device.name, half)
            freeze_loaded_objects()
        except MmkdError as error:
            self.failure = error

    def teardown(self, worker: Worker) -> None:
        self.loaded.clear()
        if self.bench is not None:
            self.bench.threads.close()


def _load(spec: TeacherSpec, card: TeacherCard, device: Device) -> Teacher:
    try:
        return load_teacher(spec, card, device.place)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise full_device(device.place) from error
        if device.alive():
            raise
        raise lost_device(device.place, error) from error


def run_task(store: Store, task: ShardTask) -> ShardReport | MmkdError:
    """Do one task with this worker's teachers. An error that the user can correct (a full disk) is a result: Dask would
    log it with a traceback on every worker. Anything else is a bug and is raised."""
    worker = get_worker()
    plugin: TeachersPlugin = worker.plugins[PLUGIN_NAME]
    if plugin.failure is not None:
        return _refused(worker, plugin.failure)
    assert plugin.bench is not None
    bench = replace(plugin.bench, isolated=task.isolated, keep_inputs=task.inputs)
    try:
        with bench.watch.over_shard():
            teachers = _unfinished(store.root, task, plugin.loaded)
            act = retry_shard if task.retry else extract_shard
            wanted = teachers or task.inputs is not None
            report = act(store, task.shard, teachers, bench) if wanted else finished_report(store.root, task)
    except MmkdError as error:
        return error
    except RuntimeError as error:
        if bench.device.alive():
            raise
        plugin.failure = lost_device(bench.device.place, error)
        return _refused(worker, plugin.failure)
    report.worker, report.peak = str(worker.name), plugin.peak
    return report


def _refused(worker: Worker, failure: MmkdError) -> MmkdError:
    """Return why this worker does no task. One without a device ends for good, so that it gets no more of them."""
    if isinstance(failure, DeviceError):
        failure.worker = worker.address
        # The answer has to be out before.
        worker.loop.add_callback(worker.loop.call_later, 1.0, partial(worker.close, nanny=True, reason="no-device"))
    return failure


def finished_report(root: StorePath, task: ShardTask) -> ShardReport:
    """Report from the store on a shard whose worker finished it and died before reporting."""
    if task.retry:
        return ShardReport(task.shard, ())
    table, _ = read_part(root, task.shard)
    return ShardReport(task.shard, task.teachers, rows=len(table)).count(table)


def _unfinished(root: StorePath, task: ShardTask, loaded: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """Return the task's teachers, without those that another run or a lost worker has finished since it was planned."""
    entries, teachers = entries_of_shard(root, task.shard), {slug: loaded[slug] for slug in task.teachers}
    if task.retry:
        # A shard without entries of all of them is not retried: planning finds it again.
        return teachers if teachers.keys() == entries.keys() else {}
    done = {
        slug for slug, entry in entries.items() if slug in loaded and entry.teacher_digest == loaded[slug].card.digest
    }
    return {slug: teacher for slug, teacher in teachers.items() if slug not in done}


@dataclass(frozen=True)
class LostShard:
    """A shard that could not be done; the others went on."""

    shard: int
    reason: str


def gather(
    client: Client, store: Store, tasks: Sequence[ShardTask], say: Callable[[str], None]
) -> Generator[ShardReport | LostShard, None, None]:
    """Do the tasks and yield the outcome of each as it finishes. Dask blames a dead worker for all its tasks: those
    blamed too often are done again at the end, one at a time, so that each is blamed for itself alone. Raises UserError
    if the scheduler went away, MmkdError for a fault that the user can correct, such as a full disk."""
    rounds: deque[Sequence[ShardTask]] = deque([tasks])
    refused: set[str] = set()
    while rounds:
        again: list[ShardTask] = []
        for task, outcome in _outcomes(client, store, rounds.popleft()):
            if isinstance(outcome, KilledWorker) and not task.isolated:
                say(
                    f"shard {task.shard} was in hand when its workers died: once more at the end, by itself, "
                    "each image decoded in a process of its own"
                )
                rounds.append([replace(task, isolated=True)])
            elif isinstance(outcome, DeviceError):
                if outcome.worker not in refused:
                    say(f"{outcome}; the other workers do its shards")
                refused.add(outcome.worker)
                if set(client.nthreads()) <= refused:
                    raise outcome
                again.append(task)
            elif isinstance(outcome, KilledWorker):
                yield LostShard(task.shard, "its workers died or hung; too little memory, or a fault in a teacher?")
            elif isinstance(outcome, BaseException):
                yield LostShard(task.shard, f"{type(outcome).__name__}: {cause(outcome)}".removesuffix(": "))
            else:
                yield outcome
        if again:
            rounds.appendleft(again)


def _outcomes(
    client: Client, store: Store, tasks: Sequence[ShardTask]
) -> Iterator[tuple[ShardTask, ShardReport | BaseException]]:
    by_key = {f"{'isolated' if task.isolated else 'shard'}-{task.shard:05d}": task for task in tasks}
    # One graph: Dask then knows that there are many, and hands a worker no more than it has threads for. Retries: a
    # fault of the machine passes, one of the code recurs.
    futures = client.map(partial(run_task, store), tasks, key=list(by_key), pure=False, retries=2)
    for batch in as_completed(futures).batches():
        # All results of a batch with one request: one for each would be the limit of several hundred workers.
        finished = [future for future in batch if future.status == "finished"]
        results = dict(zip(finished, client.gather(finished), strict=True))
        for future in batch:
            if future.status in ("cancelled", "lost"):
                raise UserError(
                    f"the Dask scheduler at {client.scheduler.address} went away; what was finished is kept: "
                    "run the same command again to go on"
                )
            outcome = results[future] if future in results else future.exception()
            if isinstance(outcome, MmkdError) and not isinstance(outcome, DeviceError) and future in results:
                raise outcome
            yield by_key[future.key], outcome
            future.release()
