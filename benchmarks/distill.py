"""A training step: against the same step on ready tensors, with teachers online, with one teacher and nine, and more.

Ratios of medians within one run, contenders taken in turn. What waits for data runs in blocks of steps whose first ones
are not counted, so that nothing is measured on batches that were made while others ran. On a CPU one core is left to
the worker process that decodes images. The student is small; "teachers online" are nine models of its own size.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from mmkd.base.process import keep_freed_memory
from mmkd.benchmarks.extract import shards_of
from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.slow_s3 import slow_bucket
from mmkd.distill.batches import Batch
from mmkd.distill.config import RunConfig, StudentConfig
from mmkd.distill.prepare import prepare
from mmkd.distill.run import Run
from mmkd.distill.student import Towers, build_student
from mmkd.distill.world import World
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.inputs import SCHEMA as INPUTS
from mmkd.store.inputs import write_inputs
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

TEACHERS, DIM, BATCH, REPEATS = 9, 512, 32, 9
# Batches that a loader has ready before its step is asked for: two of its worker, one of the thread, one spare.
AHEAD, BLOCK, BLOCKS = 4, 8, 5
STUDENT: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}
LITE = {"timm_model_name": "efficientnet_lite0", "timm_model_pretrained": False, "image_size": 224}
# Random features all the same: nothing here looks at values.
SIZES = {"x 1": 1_000, "x 10": 10_000, "x 100": 100_000}
MEMORY_DIM = 64
REQUEST_SECONDS, STEP_SECONDS = 0.03, 0.05


def make_store(root: Path, rows: int, teachers: int, dim: int) -> None:
    """Random features, one picture for all rows, captions of 3 to 40 words."""
    root.parent.mkdir(exist_ok=True)
    Image.effect_noise((96, 96), 50).convert("RGB").save(root.parent / "picture.jpg")
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {name: [None] * rows for name in sample_schema(()).names}
    columns |= {"row": list(range(rows)), "key": list(map(str, range(rows))), "status": ["ok"] * rows}
    columns |= {"caption": [f"{row} " + "lung " * int(n) for row, n in enumerate(rng.integers(2, 40, rows))]}
    columns |= {"uri": ["picture.jpg"] * rows}
    index = pa.table(columns, schema=sample_schema(()))
    place = str(root.parent)
    store = create_store(root, CorpusRecord(kind="table", location=place, root=place, rows=rows, digest="-"), index)
    look = Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,))
    for number in range(teachers):
        card = TeacherCard(
            slug=f"t{number}", source="-", weights_sha256="-", preprocessing=look, tokenizer_sha256="-",
            context_length=1, dim=dim,
        )  # fmt: skip
        add_teacher(store, card)
        for shard, span in enumerate(iter_shards(store.record)):
            features = rng.standard_normal((len(span), dim), dtype=np.float32).astype(np.float16)
            valid = np.full(len(span), 3, dtype=np.uint8)
            write_shard(store, card, shard, ShardFeatures(features, features, valid), read_part(root, shard)[1])


def prepared(store: Path, name: str, device: torch.device, url: str = "", **changes: Any) -> Run:
    """A run of the small student over a store, ready for its first step. `url`: where it is read from."""
    student = store.parent / "student.json"
    student.write_text(json.dumps(STUDENT))
    base = {"store": url or store, "out": store.parent / name, "student": {"model": str(student)}, "batch_size": BATCH}
    config = RunConfig.model_validate(base | {"epochs": 10_000, "data": {"workers": 1}} | changes)
    return prepare(config, World(device))


def online(device: torch.device) -> Callable[[Batch], None]:
    """Nine teachers of the student's size, as `open_clip` would run them beside the training."""

    def made(folder: str) -> Towers:
        path = Path(folder) / "student.json"
        path.write_text(json.dumps(STUDENT))
        return Towers(build_student(StudentConfig(model=str(path)))).eval().to(device)

    with tempfile.TemporaryDirectory() as folder:
        teachers = [made(folder) for _ in range(TEACHERS)]

    @torch.no_grad()
    def ask(batch: Batch) -> None:
        for teacher in teachers:
            teacher(batch.images, batch.tokens)

    return ask


def seconds(act: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device waited for."""
    started = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def medians(contenders: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each, in turn, after a round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPEATS + 1):
        for name, act in contenders.items():
            taken = seconds(act, device)
            if turn:
                times[name].append(taken)
    return {name: statistics.median(found) for name, found in times.items()}


@dataclass
class Blocks:
    """Steps in a row with their data, or on one ready batch: seconds of each counted step, and of its waiting."""

    run: Run
    batches: Iterator[Batch]
    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def take(self, device: torch.device) -> None:
        """One block."""
        for number in range(AHEAD + BLOCK):
            started = time.perf_counter()
            batch = next(self.batches)
            waited = time.perf_counter() - started
            stepped = seconds(lambda batch=batch: self.run.update(batch), device)  # type: ignore[misc]
            if number >= AHEAD:
                self.steps.append(waited + stepped)
                self.waits.append(waited)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.steps)


def row(what: str, against: str, taken: float, reference: float, goal: str = "") -> Row:
    """A comparison of times, in milliseconds."""
    kind: Literal["cpu", "gpu"] = "gpu" if torch.cuda.is_available() else "cpu"
    return Row(
        what=what, against=against, value=taken * 1e3, reference=reference * 1e3, unit="ms", goal=goal, device=kind
    )  # fmt: skip


def data_wait(root: Path, device: torch.device) -> list[Row]:
    """Steps with images and features from disk against steps on one ready batch, and nine teachers against one."""
    nine = prepared(root, "nine", device)
    one = prepared(root, "one", device, teachers=("t0",))
    with ExitStack() as stack:
        data = [stack.enter_context(closing(run.batches.from_step(0))) for run in (nine, one)]
        ready = repeat(next(data[0]))
        blocks = [Blocks(nine, ready), Blocks(nine, data[0]), Blocks(one, data[1])]
        for _ in range(BLOCKS):
            for block in blocks:
                block.take(device)
    on_ready, from_store, single = blocks
    step = f"step of {BATCH} pairs, {TEACHERS} teachers of {DIM}, images and features from disk"
    share = sum(from_store.waits) / sum(from_store.steps)
    return [
        row(step, "the same on ready tensors", from_store.median, on_ready.median, "<= 1.02"),
        row(step, "one teacher", from_store.median, single.median, "<= 1.05"),
        Row(what="of it spent waiting for data, share", value=share, device="gpu" if device.type == "cuda" else "cpu"),
    ]


def on_ready_tensors(root: Path, device: torch.device) -> list[Row]:
    """What the parts of a step cost, on tensors that are on the device."""
    nine = prepared(root, "nine-ready", device)
    none = prepared(root, "none", device, loss={"feature": 0, "cross": 0})
    bank = prepared(root, "bank", device, loss={"bank": 1.0, "bank_rows": {"size": 1024, "refresh": BATCH}})
    cut = prepared(root, "cut", device)
    nine.update.model.towers.cuts_padding = False
    ask = online(device)
    with closing(cut.batches.from_step(0)) as data:
        batches = [next(data) for _ in range(16)]
    ready = batches[0]
    found = medians(
        {
            "ready": lambda: nine.update(ready),
            "none": lambda: none.update(replace(ready, targets=())),
            "bank": lambda: bank.update(ready),
            "online": lambda: (ask(ready), nine.update(ready)),
        },
        device,
    )
    lengths = medians(
        {
            "cut": lambda: [cut.update(batch) for batch in batches],
            "padded": lambda: [nine.update(batch) for batch in batches],
        },
        device,
    )
    base, step = found["ready"], f"step of {BATCH} pairs on ready tensors, {TEACHERS} teachers"
    return [
        row(step, "teachers online, each of the student's size", base, found["online"]),
        row(step, "no teacher (stage 1)", base, found["none"]),
        row(f"{step}, bank of 1,024 rows", "the same without a bank", found["bank"], base),
        row("text in groups of like length", "padded to 77", lengths["cut"] / 16, lengths["padded"] / 16),
    ]


def layout_row(folder: Path, device: torch.device) -> Row:
    """Forward and backward pass of EfficientNet-Lite0 in the layout that training chooses, against the other one."""
    (folder / "lite.json").write_text(json.dumps(STUDENT | {"vision_cfg": LITE}))
    pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8, device=device)
    chosen, other = (Towers(build_student(StudentConfig(model=str(folder / "lite.json")))).to(device) for _ in "ab")
    assert chosen.channels_last
    other.channels_last = False
    other.student.visual.to(memory_format=torch.contiguous_format)
    found = medians(
        {
            "chosen": lambda: torch.autograd.backward(chosen.encode_images(pixels).square().sum()),
            "other": lambda: torch.autograd.backward(other.encode_images(pixels).square().sum()),
        },
        device,
    )
    what = f"EfficientNet-Lite0, {BATCH} images of 224 pixels, forward and backward, channels-last"
    return row(what, "contiguous", found["chosen"], found["other"], "< 1")


def remote_row(folder: Path) -> Row:
    """Share of the time that steps wait for a store behind S3, after the first batch; the epoch's second half and the
    next epoch's first are in it."""
    root, batch, shard = folder / "remote" / "store", 64, 256
    shards_of(shard)
    make_store(root, 8_192, TEACHERS, DIM)
    jpeg = (root.parent / "picture.jpg").read_bytes()
    for number in range(8_192 // shard):
        rows = range(number * shard, (number + 1) * shard)
        columns = {"row": list(rows), "image_sha256": ["-"] * shard, "jpeg": [jpeg] * shard}
        write_inputs(root, number, 96, pa.table(columns, schema=INPUTS))
    with slow_bucket(root.parent, REQUEST_SECONDS) as bucket:
        data = {"order": "windows", "window": 8, "cache": folder / "cache", "workers": 1}
        run = prepared(root, "remote", torch.device("cpu"), f"{bucket}/store", batch_size=batch, data=data)
        with closing(run.batches), closing(run.batches.from_step(0)) as batches:
            next(batches)
            waited, began = 0.0, time.perf_counter()
            for _ in range(192):
                asked = time.perf_counter()
                next(batches)
                waited += time.perf_counter() - asked
                time.sleep(STEP_SECONDS)
            whole = time.perf_counter() - began
    what = f"share of waiting, batch {batch}, steps of {STEP_SECONDS * 1e3:.0f} ms, {TEACHERS} teachers of {DIM}"
    note = f"a server with {REQUEST_SECONDS * 1e3:.0f} ms a request; windows of 8 shards of {shard} rows, JPEGs too"
    return Row(what=f"{what}, store behind S3", value=waited / whole, goal="<= 0.02", note=note)


def peak_of_steps(root: Path, told: Any) -> None:
    """Private memory (not the mapped pages) after a few steps over a store, in a process of its own."""
    run = prepared(root, "memory", torch.device("cpu"), data={"workers": 0})
    with closing(run.batches.from_step(0)) as batches:
        for _ in range(4):
            run.update(next(batches))
    status = Path("/proc/self/status").read_text()
    told.put(int(status.partition("RssAnon:")[2].split()[0]) / 1024)


def memory(folder: Path) -> list[Row]:
    """Private memory against the size of the store."""
    context = multiprocessing.get_context("spawn")
    first, rows_found = 0.0, []
    for name, rows in SIZES.items():
        root = folder / f"rows{rows}" / "store"
        make_store(root, rows, TEACHERS, MEMORY_DIM)
        told = context.Queue()
        child = context.Process(target=peak_of_steps, args=(root, told))
        child.start()
        found = told.get(timeout=240)
        child.join()
        first = first or found
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / 2**20
        rows_found.append(
            Row(
                what=f"private memory of training, rows {name}: {rows:,} rows, {size:.0f} MB",
                against="rows x 1",
                value=found,
                reference=first,
                unit="MB",
                goal="<= 1.1",
            )
        )
    return rows_found


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "steps" / "store", 4_096, TEACHERS, DIM)
        store = folder / "steps" / "store"
        rows = [*data_wait(store, device), *on_ready_tensors(store, device), layout_row(folder, device)]
        rows.append(remote_row(folder))
        return rows + (memory(folder) if Path("/proc/self/status").is_file() else [])


if __name__ == "__main__":
    main(measure)
