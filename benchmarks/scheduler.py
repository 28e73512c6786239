"""A simulated extraction through a real Dask scheduler with 1 to 512 workers that sleep instead of running teachers.
Tasks, their submission and their results are those of `mmkd extract`; only the work in them is replaced.

Scheduler and client share this process, as in `mmkd extract`. The workers, each with a TCP port and a state of its own,
are in processes beside it, up to 128 in each, and press on the same cores: CPU of this process, for each task, is what
a cluster's scheduler and client would need; the rest of what the makespan is above the ideal is the workers' on this
machine. Rows per shard are those that `mmkd extract` chooses for so many workers; the ideal has the last round in it,
in which not all have a task.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import pickle
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import dask
from distributed import Client, LocalCluster, Worker

from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.scale import Watch
from mmkd.extract import dispatch as gathering
from mmkd.extract.plan import ShardTask, plan_tasks
from mmkd.extract.report import ShardReport
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.layout import rows_per_shard, shards_per_pack
from mmkd.store.record import CorpusRecord, Store, StoreRecord

ROWS, TEACHERS = 2_900_000, 9
MANY_TASKS = 4_000
# A shard of 1,024 rows takes a worker that does 455 pairs a second 2.3 s; on most GPUs it is longer.
SECONDS = {1: 0.05, 8: 0.2, 64: 1.0, 512: 4.0}
WORKERS_OF_A_PROCESS = 128
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


def record_of(rows: int, workers: int) -> StoreRecord:
    """A store's record, as it goes with each task."""
    corpus = CorpusRecord(kind="webdataset", location="/data/biomedica/*.tar", root="/data", rows=rows, digest="0" * 64)
    per_shard = rows_per_shard(rows, workers)
    return StoreRecord(
        format=2, rows=rows, rows_per_shard=per_shard, shards_per_pack=shards_per_pack(rows, per_shard), corpus=corpus,
        created="2026-01-01T00:00:00+00:00",
        versions=dict.fromkeys(("mmkd", "zarr", "numpy", "pyarrow"), "1.0.0"),
    )  # fmt: skip


def tasks_of(rows: int, workers: int = 1) -> tuple[StoreRecord, list[ShardTask]]:
    """The plan of a whole extraction."""
    record = record_of(rows, workers)
    look = Preprocessing(image_size=(224, 224), mean=(0.5,), std=(0.5,))
    cards = [
        TeacherCard(
            slug=f"teacher{number}", source="-", weights_sha256=str(number), preprocessing=look, tokenizer_sha256="-",
            context_length=77, dim=512,
        )
        for number in range(TEACHERS)
    ]  # fmt: skip
    return record, plan_tasks(record, cards, {})


SETTINGS = {
    "distributed.scheduler.worker-saturation": 1.0,  # as `mmkd extract` has it
    "distributed.admin.tick.limit": "60s",
    "distributed.worker.profile.enabled": False,
    # Each worker would look fifty times a second whether its event loop is late, and twice how busy the machine is.
    "distributed.admin.tick.interval": "10s",
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.comm.timeouts.connect": "120s",
}


def work(address: str, numbers: range) -> None:
    """A process with some workers of one thread each, until their scheduler goes."""

    async def all_workers() -> None:
        workers = [
            Worker(address, nthreads=1, name=number, host="127.0.0.1", dashboard=False, memory_limit=0)
            for number in numbers
        ]
        await asyncio.gather(*workers)
        await asyncio.gather(*(worker.finished() for worker in workers))

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # the scheduler goes before its workers
    with dask.config.set(SETTINGS):
        asyncio.run(all_workers())


@contextmanager
def cluster_of(workers: int) -> Iterator[Client]:
    """A scheduler in this process, and its workers in others."""
    context = multiprocessing.get_context("spawn")
    with dask.config.set(SETTINGS):
        cluster = LocalCluster(
            n_workers=0, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address="127.0.0.1:0",
            silence_logs=50,
        )  # fmt: skip
        starts = range(0, workers, WORKERS_OF_A_PROCESS)
        numbers = [range(start, min(start + WORKERS_OF_A_PROCESS, workers)) for start in starts]
        hosts = [context.Process(target=work, args=(cluster.scheduler_address, some), daemon=True) for some in numbers]
        for host in hosts:
            host.start()
        try:
            with cluster, Client(cluster) as client:
                client.wait_for_workers(workers, timeout=300)
                yield client
        finally:
            for host in hosts:
                host.terminate()
                host.join()


class Ran(NamedTuple):
    """One run: seconds from the first task to the last report; CPU seconds and MB more of this process; tasks done."""

    seconds: float
    cpu: float
    memory: float
    done: int


def run(client: Client, rows: int, mean: float, workers: int = 1) -> Ran:
    """Do the whole plan with `client`."""
    record, tasks = tasks_of(rows, workers)
    watch, cpu = Watch(0.02), time.process_time()
    with mock.patch.object(gathering, "run_task", sleep_task):
        done = sum(
            isinstance(found, ShardReport)
            for found in gathering.gather(client, Store(Path(str(mean)), record), tasks, print)
        )
    seconds, memory, _ = watch.told()
    assert done == len(tasks)
    return Ran(seconds, time.process_time() - cpu, memory, done)


def makespan(workers: int) -> Row:
    """All tasks of 2.9 million rows on a cluster."""
    mean = SECONDS[workers]
    with cluster_of(workers) as client:
        run(client, 32_768, 0.01)  # warm
        _, tasks = tasks_of(ROWS, workers)
        ideal = ideal_seconds(tasks, workers, mean)
        ran = run(client, ROWS, mean, workers)
    return Row(
        what=f"makespan, {workers} workers, {ran.done:,} tasks of {mean} s ({ROWS:,} rows)", against="ideal",
        value=ran.seconds, reference=ideal, unit="s", goal="<= 1.1" if workers == 512 else "",
        note=f"scheduler and client: {ran.cpu / ran.done * 1e3:.1f} ms of CPU a task, {ran.memory:.0f} MB more",
    )  # fmt: skip


def bare_overhead(client: Client, tasks_wanted: int) -> Iterator[Row]:
    """Tasks that do nothing: what the scheduler alone takes for each."""
    ran = run(client, tasks_wanted * 16_384, 0.0)
    yield Row(
        what=f"scheduler, client and workers, {ran.done:,} empty tasks", value=ran.seconds / ran.done * 1e3,
        unit="ms a task",
        note=f"of them {ran.cpu / ran.done * 1e3:.1f} ms of CPU of scheduler and client; "
        f"{ran.memory / ran.done * 1e3:.0f} KB a task while they wait",
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
    return [*found, *map(makespan, SECONDS)]


if __name__ == "__main__":
    main(measure)
