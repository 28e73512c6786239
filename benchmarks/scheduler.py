"""A simulated extraction through a real Dask scheduler with 1 to 512 workers that sleep instead of running teachers.
Tasks, their submission and their results are those of `mmkd extract`; only the work in them is replaced.

Scheduler and workers share this process and its event loop, each worker with a TCP port of its own: 512 workers press
on one interpreter here, on a cluster the scheduler has one to itself. 2.9 million rows are 178 tasks, so that beyond
178 workers nothing gets faster; the runs of many tasks are stores of 50 and 65 million rows: every worker is busy.
"""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import dask
from distributed import Client, LocalCluster

from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.scale import Watch
from mmkd.extract import dispatch as gathering
from mmkd.extract.plan import ShardTask, plan_tasks
from mmkd.extract.report import ShardReport
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.layout import rows_per_shard
from mmkd.store.record import CorpusRecord, Store, StoreRecord

ROWS, TEACHERS = 2_900_000, 9
MANY_TASKS = 4_000
# Long enough that the scheduler is not asked more often than by a real run of that many workers: a shard takes minutes.
SECONDS = {1: 0.05, 8: 0.2, 64: 1.0, 512: 4.0}
JITTER = 0.2


def sleep_task(store: Store, task: ShardTask) -> ShardReport:
    """What a worker does here in place of `run_task`; its duration differs from shard to shard, by a fifth at most."""
    time.sleep(task_seconds(task.shard, float(store.root.name)))
    return ShardReport(task.shard, task.teachers, rows=store.record.rows_per_shard)


def task_seconds(shard: int, mean: float) -> float:
    """Of one task; a function of its shard alone."""
    return mean * (1 + JITTER * random.Random(shard).uniform(-1, 1))


def ideal_seconds(tasks: list[ShardTask], workers: int, mean: float) -> float:
    """Makespan without a scheduler: each task goes to the worker that is free first."""
    free = [0.0] * workers
    for task in tasks:
        first = min(range(workers), key=free.__getitem__)
        free[first] += task_seconds(task.shard, mean)
    return max(free)


def record_of(rows: int) -> StoreRecord:
    """A store's record, as it goes with each task."""
    corpus = CorpusRecord(kind="webdataset", location="/data/biomedica/*.tar", root="/data", rows=rows, digest="0" * 64)
    return StoreRecord(
        format=2, rows=rows, rows_per_shard=rows_per_shard(rows), shards_per_pack=32, corpus=corpus,
        created="2026-01-01T00:00:00+00:00",
        versions=dict.fromkeys(("mmkd", "zarr", "numpy", "pyarrow"), "1.0.0"),
    )  # fmt: skip


def tasks_of(rows: int) -> tuple[StoreRecord, list[ShardTask]]:
    """The plan of a whole extraction."""
    record = record_of(rows)
    look = Preprocessing(image_size=(224, 224), mean=(0.5,), std=(0.5,))
    cards = [
        TeacherCard(
            slug=f"teacher{number}", source="-", weights_sha256=str(number), preprocessing=look, tokenizer_sha256="-",
            context_length=77, dim=512,
        )
        for number in range(TEACHERS)
    ]  # fmt: skip
    return record, plan_tasks(record, cards, {})


@contextmanager
def cluster_of(workers: int) -> Iterator[Client]:
    """A scheduler and its workers, one thread each, in this process."""
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,  # as `mmkd extract` has it
        "distributed.admin.tick.limit": "60s",
        "distributed.worker.profile.enabled": False,
        # Each worker would look fifty times a second whether its event loop is late, and twice how busy the machine is;
        # here they all have one loop and one machine.
        "distributed.admin.tick.interval": "10s",
        "distributed.admin.system-monitor.interval": "60s",
        "distributed.admin.system-monitor.disk": False,
        "distributed.comm.timeouts.connect": "120s",
    }
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=False, protocol="tcp://", host="127.0.0.1",
            dashboard_address="127.0.0.1:0", worker_dashboard_address=None, memory_limit=0, silence_logs=50,
        )  # fmt: skip
        with cluster, Client(cluster) as client:
            client.wait_for_workers(workers, timeout=300)
            yield client


def run(client: Client, rows: int, mean: float) -> tuple[float, float, int]:
    """Seconds from the first task to the last report, MB more in this process at most, tasks done."""
    record, tasks = tasks_of(rows)
    watch = Watch(0.02)
    with mock.patch.object(gathering, "run_task", sleep_task):
        done = sum(
            isinstance(found, ShardReport)
            for found in gathering.gather(client, Store(Path(str(mean)), record), tasks, print)
        )
    seconds, memory, _ = watch.told()
    assert done == len(tasks)
    return seconds, memory, done


def rows_of_page(workers: int, many: int) -> Iterator[Row]:
    """One cluster, two corpora on it."""
    mean = SECONDS[workers]
    with cluster_of(workers) as client:
        run(client, 32_768, 0.01)  # warm
        # As many tasks for each worker as keep the run below half a minute or so.
        long = min(many, max(workers * 6, 400)) * 16_384
        for rows in (ROWS, long):
            _, tasks = tasks_of(rows)
            ideal = ideal_seconds(tasks, workers, mean)
            taken, memory, done = run(client, rows, mean)
            busy = min(workers, done)
            overhead = (taken - ideal) * 1e3 / math.ceil(done / busy)
            yield Row(
                what=f"makespan, {workers} workers, {done:,} tasks of {mean} s ({rows:,} rows)", against="ideal",
                value=taken, reference=ideal, unit="s",
                note=f"{overhead:.1f} ms more for each task of a worker; {memory:.0f} MB more, scheduler and workers",
            )  # fmt: skip


def bare_overhead(client: Client, tasks_wanted: int) -> Iterator[Row]:
    """Tasks that do nothing: what the scheduler alone takes for each."""
    rows = tasks_wanted * 16_384
    taken, memory, done = run(client, rows, 0.0)
    yield Row(
        what=f"scheduler, client and workers, {done:,} empty tasks", value=taken / done * 1e3, unit="ms a task",
        note=f"{memory / done * 1e3:.0f} KB a task while they wait",
    )  # fmt: skip


def task_bytes() -> Row:
    """What goes to a worker with each task."""
    record, tasks = tasks_of(ROWS)
    size = len(pickle.dumps((Path("/data/store"), record, tasks[0])))
    return Row(what="arguments of one task, pickled", value=size / 1e3, unit="KB")


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    many = MANY_TASKS * (5 if full else 1)
    found = [task_bytes()]
    with cluster_of(8) as client:
        run(client, 32_768, 0.01)
        found += bare_overhead(client, many)
    for workers in SECONDS:
        found += rows_of_page(workers, many)
    return found


if __name__ == "__main__":
    main(measure)
