"""What runs inside a Dask worker: teachers loaded once per process, one shard at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from distributed import WorkerPlugin, get_worker
from distributed.worker import Worker

from mmkd.extract.plan import ShardTask
from mmkd.extract.shard import ShardReport, extract_shard
from mmkd.extract.teachers import Teacher, TeacherSpec, load_teacher
from mmkd.store import MmkdError, TeacherCard
from mmkd.store.malloc import keep_freed_memory
from mmkd.store.record import StoreRecord

PLUGIN_NAME = "mmkd-teachers"


class TeachersPlugin(WorkerPlugin):  # type: ignore[misc]  # dask has no type hints
    """Loads every teacher when a worker joins. What keeps it from loading one is the answer to its first task."""

    name = PLUGIN_NAME

    def __init__(self, teachers: Sequence[tuple[TeacherSpec, TeacherCard]]) -> None:
        self.specs = list(teachers)
        self.loaded: dict[str, Teacher] = {}
        self.failure: MmkdError | None = None

    def setup(self, worker: Worker) -> None:
        """Load the teachers on this worker's device."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            # One thread a process: the split of a matrix product over threads can change its last bit,
            # and processes scale better than threads here anyway.
            torch.set_num_threads(1)
            keep_freed_memory()
        try:
            self.loaded = {card.slug: load_teacher(spec, card, device) for spec, card in self.specs}
        except MmkdError as error:
            self.failure = error

    def teardown(self, worker: Worker) -> None:
        """Let the memory go."""
        self.loaded.clear()


def run_task(
    root: Path, record: StoreRecord, task: ShardTask, decode_threads: int, keep_inputs: int | None
) -> ShardReport | MmkdError:
    """Extract one shard with this worker's teachers.

    An error that the user can mend (a full disk) is a result: Dask would log it with a traceback on
    every worker, and the client says it in one line. Anything else is a bug and is raised.
    """
    plugin = get_worker().plugins[PLUGIN_NAME]
    if plugin.failure is not None:
        failure: MmkdError = plugin.failure
        return failure
    teachers: Mapping[str, Teacher] = {slug: plugin.loaded[slug] for slug in task.teachers}
    try:
        return extract_shard(root, record, task.shard, teachers, decode_threads, keep_inputs)
    except MmkdError as error:
        return error
