"""Extraction and training behind a simulated accelerator: is it ever without work? Its passes, copies and launches take
stated times; images are JPEGs that are read, decoded and brought to the geometries of the nine teachers.

The rate of preparation alone is measured first, in the same run. Then the device is made slower than it (preparation
can keep up: its busy share counts) and twice as fast (it cannot: the share of preparation's own rate counts). The order
of work of before, for comparison, on the same device: a copy for each teacher, every pass waited for, nothing launched
ahead. Training: the step is a sleep, everything before it is real; the share of time spent waiting for data.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.images.uri import image_source
from mmkd.benchmarks.extract import shards_of, write_corpus
from mmkd.benchmarks.result import Row, main
from mmkd.extract.corpora import open_corpus
from mmkd.extract.decoding import Threads, decode_windows
from mmkd.extract.device import Encode, Pass
from mmkd.extract.encode import Workbench
from mmkd.extract.forward import BatchSizes
from mmkd.extract.report import ShardReport
from mmkd.extract.run import make_store
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers.geometry import geometry_of
from mmkd.extract.teachers.spec import Teacher
from mmkd.store import FeatureStore, Preprocessing, TeacherCard
from mmkd.store.record import Store
from mmkd.store.writer import add_teacher
from mmkd.tests.simulated_device import SimulatedDevice

DIM, WINDOW, SHARDS = 512, 32, 4
# The four geometries of the nine, in the order in which one, three and nine teachers have them.
GEOMETRIES = (
    {"resize_mode": "shortest", "image_size": (224, 224)},
    {"resize_mode": "hf_shortest", "image_size": (224, 224)},
    {"resize_mode": "pad_square", "image_size": (224, 224), "color": "L", "interpolation": "bilinear"},
    {"resize_mode": "squash", "image_size": (224, 224)},
)


class Free:
    """A teacher that costs the host next to nothing; the simulated device takes the time."""

    device = torch.device("cpu")

    def __init__(self, number: int) -> None:
        look = Preprocessing(mean=(0.5,), std=(0.5,), **GEOMETRIES[number % len(GEOMETRIES)])
        self.card = TeacherCard(
            slug=f"t{number}", source="-", weights_sha256="-", preprocessing=look, tokenizer_sha256="-",
            context_length=77, dim=DIM,
        )  # fmt: skip

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.reshape(len(pixels), -1)[:, :DIM].float() + 1

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        return torch.ones(len(captions), 77, dtype=torch.long), [77] * len(captions)

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, :1].float().expand(-1, DIM)


class WaitedFor(SimulatedDevice):
    """The same device in the order of work of before: each pass brings its own copy and is waited for."""

    ahead = 0

    def stage(self, rows: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows))

    def launch(self, encode: Encode, inputs: torch.Tensor) -> Pass:
        moved, _ = self.copy_in(inputs)
        launched = super().launch(encode, moved)
        launched.wait()
        return launched


def preparation_rate(folder: Path, images: int, teachers: Sequence[Free], threads: Threads) -> float:
    """Images a second when nothing but reading, decoding and resizing runs."""
    sources = [image_source(str(folder), f"{number}.jpg") for number in range(images)]
    geometries = tuple(dict.fromkeys(geometry_of(teacher.card.image_preprocessing) for teacher in teachers))
    started = time.perf_counter()
    for window in decode_windows(sources, geometries, WINDOW, threads):
        assert all(image.pixels for image in window)
    return images / (time.perf_counter() - started)


def extraction(corpus: Path, root: Path, teachers: Sequence[Free], device: SimulatedDevice, threads: Threads) -> float:
    """Seconds of all shards."""
    store = make_store(open_corpus(str(corpus)), root)
    for teacher in teachers:
        add_teacher(store, teacher.card)
    bench = Workbench(threads, device=device, sizes=BatchSizes(WINDOW))
    loaded = {teacher.card.slug: teacher for teacher in teachers}
    return in_hand(store, FeatureStore.open(root).shards, loaded, bench)[0]


def in_hand(
    store: Store, shards: int, teachers: Mapping[str, Teacher], bench: Workbench
) -> tuple[float, list[ShardReport]]:
    """Seconds and reports of all shards, two of them in hand, as a worker with a GPU has them."""
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as hands:
        reports = list(hands.map(lambda shard: extract_shard(store, shard, teachers, bench), range(shards)))
    return time.perf_counter() - started, reports


def stated(rate: float, teachers: int, kind: type[SimulatedDevice] = SimulatedDevice) -> SimulatedDevice:
    """A device that all teachers together keep busy at `rate` pairs a second, half of the time with captions."""
    row_seconds = 1 / rate / teachers / 2
    return kind(row_seconds=row_seconds, launch_seconds=min(2e-4, row_seconds * WINDOW / 4))


def busy_rows(folder: Path, side: int, number: int, images: int, threads: Threads) -> list[Row]:
    """One size of images and number of teachers."""
    teachers = [Free(index) for index in range(number)]
    corpus = write_corpus(folder / f"{side}", images, side) if not (folder / f"{side}").exists() else None
    table = corpus or folder / f"{side}" / "pairs.csv"
    rate = preparation_rate(table.parent, images, teachers, threads)
    # On few cores the other half of a core is left to the loop, which a GPU machine has to spare.
    slower, faster = stated(0.75 * rate, number), stated(2 * rate, number)
    before = stated(0.75 * rate, number, WaitedFor)
    taken = {
        name: extraction(table, folder / f"{name}{side}x{number}", teachers, device, threads)
        for name, device in (("slower", slower), ("faster", faster), ("before", before))
    }
    what = f"{number} teacher{'s' * (number > 1)}, {images} images of {side} pixels"
    shares = {"slower": slower.busy_share, "before": before.busy_share}
    return [
        Row(
            what=f"busy share of a device of {0.75 * rate:.0f} images/s, {what}",
            value=shares["slower"], goal=">= 0.97",
            note=f"in the order of before {shares['before']:.3f}; preparation alone {rate:.0f} images/s",
        ),
        Row(
            what=f"images a second, device of {2 * rate:.0f}, {what}", against="preparation alone",
            value=images / taken["faster"], reference=rate, goal=">= 0.95",
        ),
    ]  # fmt: skip


def training_rows(folder: Path) -> list[Row]:
    """Share of the time that a step of stated length waits for its data."""
    from mmkd.benchmarks.distill import make_store as make_training_store
    from mmkd.benchmarks.distill import prepared
    from mmkd.distill.prepare import default_workers

    root = folder / "training" / "store"
    make_training_store(root, 16_384, 9, DIM)
    rows = []
    # Of 4,096 images in less than 200 ms few machines dream.
    for batch, milliseconds in ((256, 20), (256, 50), (256, 200), (4096, 200)):
        steps = 8 if batch == 256 else 2
        run = prepared(root, f"b{batch}s{milliseconds}", torch.device("cpu"), batch_size=batch, data={"workers": None})
        with closing(run.batches.from_step(0)) as batches:
            started, made = time.perf_counter(), 0
            for _ in range(steps):
                next(batches)
                made += batch
            rate = made / (time.perf_counter() - started)  # data alone
            waited = total = 0.0
            for number in range(2 * steps):
                began = time.perf_counter()
                next(batches)
                got = time.perf_counter()
                time.sleep(milliseconds / 1000)
                if number >= steps:
                    waited, total = waited + got - began, total + time.perf_counter() - began
        needed = batch / milliseconds * 1000
        rows.append(
            Row(
                what=f"share of waiting, batch {batch:,}, steps of {milliseconds} ms, 9 teachers, JPEGs of 96 pixels",
                value=waited / total,
                goal="< 0.01" if rate > 1.1 * needed else "",
                note=f"{needed:,.0f} images/s wanted, data alone gives {rate:,.0f} with {default_workers()} workers",
            )
        )
    return rows


def processes_row(folder: Path, images: int) -> Row:
    """Whether the interpreter's lock limits the threads: as many threads as cores against one."""
    cores = len(os.sched_getaffinity(0))
    teachers = [Free(index) for index in range(9)]
    rates = [preparation_rate(folder / "500", images, teachers, Threads(number)) for number in (1, cores)]
    what = f"preparation for 9 teachers, {cores} threads in one process"
    return Row(what=what, against="one thread, for each", value=rates[1], reference=rates[0] * cores, unit="images/s")


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    torch.set_num_threads(1)
    threads = Threads(len(os.sched_getaffinity(0)), 4)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side, images in ((500, 4096 if full else 512), (1000, 2048 if full else 256)):
            shards_of(images // SHARDS)
            for number in (1, 3, 9):
                rows += busy_rows(folder, side, number, images, threads)
        rows.append(processes_row(folder, 256))
        rows += training_rows(folder)
    assert threading.active_count() < 100
    return rows


if __name__ == "__main__":
    main(measure)
