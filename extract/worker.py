"""Code of a Dask worker: teachers loaded once per process, one shard at a time per thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from distributed import WorkerPlugin, get_worker
from distributed.worker import Worker

from mmkd.base.places.remote import StorePath
from mmkd.base.process import keep_freed_memory
from mmkd.extract.cluster_config import WorkerConfig
from mmkd.extract.encode import Workbench
from mmkd.extract.forward import BatchSizes
from mmkd.extract.plan import ShardTask
from mmkd.extract.progress import Watch
from mmkd.extract.report import ShardReport
from mmkd.extract.retry import retry_shard
from mmkd.extract.shard import extract_shard
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

    def __init__(self, teachers: Sequence[tuple[TeacherSpec, TeacherCard]], settings: WorkerConfig) -> None:
        self.specs = list(teachers)
        self.settings = settings
        self.loaded: dict[str, Teacher] = {}
        self.bench: Workbench | None = None
        self.failure: MmkdError | None = None

    def setup(self, worker: Worker) -> None:
        """Load the teachers on this worker's device."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            # One thread per process: the split of a matrix product over threads can change its last bit,
            # and processes scale better than threads here anyway.
            torch.set_num_threads(1)
            keep_freed_memory()
        self.bench = Workbench(
            decode_threads=self.settings.decode_threads,
            read_threads=self.settings.read_threads,
            sizes=BatchSizes(self.settings.batch_rows),
            watch=Watch(self.settings.hang_seconds),
        )
        try:
            self.loaded = {card.slug: load_teacher(spec, card, device) for spec, card in self.specs}
            for teacher in self.loaded.values():
                if isinstance(teacher, LoadedTeacher):
                    teacher.tune(channels_last=self.settings.channels_last, compiled=self.settings.compile)
        except MmkdError as error:
            self.failure = error

    def teardown(self, worker: Worker) -> None:
        """Release the memory."""
        self.loaded.clear()


def run_task(store: Store, task: ShardTask) -> ShardReport | MmkdError:
    """Do one task with this worker's teachers. An error that the user can correct (a full disk) is a result: Dask would
    log it with a traceback on every worker, and the client says it in one line. Anything else is a bug and is
    raised."""
    worker = get_worker()
    plugin: TeachersPlugin = worker.plugins[PLUGIN_NAME]
    if plugin.failure is not None:
        return plugin.failure
    assert plugin.bench is not None
    bench = replace(plugin.bench, isolated=task.isolated, keep_inputs=task.inputs)
    try:
        with bench.watch.over_shard():
            teachers = _still_wanted(store.root, task, plugin.loaded)
            act = retry_shard if task.retry else extract_shard
            wanted = teachers or task.inputs is not None
            report = act(store, task.shard, teachers, bench) if wanted else finished_report(store.root, task)
    except MmkdError as error:
        return error
    report.worker = str(worker.name)
    return report


def finished_report(root: StorePath, task: ShardTask) -> ShardReport:
    """Report from the store on a shard whose worker finished it and died before reporting."""
    if task.retry:
        return ShardReport(task.shard, ())
    table, _ = read_part(root, task.shard)
    return ShardReport(
        task.shard,
        task.teachers,
        rows=len(table),
        status=dict(Counter(table["status"].to_pylist())),
        reasons=dict(Counter(reason for reason in table["reason"].to_pylist() if reason)),
    )


def _still_wanted(root: StorePath, task: ShardTask, loaded: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """Return the task's teachers, without those that another run or a lost worker has finished since it was planned."""
    entries = entries_of_shard(root, task.shard)
    if task.retry:
        # A shard without entries of all of them is not retried: planning finds it again.
        return {slug: loaded[slug] for slug in task.teachers} if set(task.teachers) == set(entries) else {}
    return {
        slug: loaded[slug]
        for slug in task.teachers
        if slug not in entries or entries[slug].teacher_digest != loaded[slug].card.digest
    }
