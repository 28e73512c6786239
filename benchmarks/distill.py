"""A training step: against the same step on ready tensors, with teachers online, with one teacher and nine, and more.

Everything is a ratio of medians within one run, contenders taken in turn.
The student is small and the device whatever torch finds; "teachers online" are nine models of the student's own size.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from mmkd.benchmarks.result import Row, main
from mmkd.distill.batch import Batch
from mmkd.distill.config import RunConfig
from mmkd.distill.prepare import Run, prepare
from mmkd.distill.student import Towers, build_student
from mmkd.distill.world import World
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.malloc import keep_freed_memory
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

TEACHERS, DIM, BATCH, REPEATS = 9, 512, 32, 5
STUDENT = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}
# Random features all the same: nothing here looks at values.
SIZES = {"x 1": 1_000, "x 10": 10_000, "x 100": 100_000}
MEMORY_DIM = 64


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
    record = create_store(root, CorpusRecord(kind="table", location=place, root=place, rows=rows, digest="-"), index)
    look = Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,))
    for number in range(teachers):
        card = TeacherCard(
            slug=f"t{number}", source="-", weights_sha256="-", preprocessing=look, tokenizer_sha256="-",
            context_length=1, dim=dim,
        )  # fmt: skip
        add_teacher(root, record, card)
        for shard, span in enumerate(iter_shards(record)):
            features = rng.standard_normal((len(span), dim), dtype=np.float32).astype(np.float16)
            valid = np.full(len(span), 3, dtype=np.uint8)
            write_shard(root, record, card, shard, ShardFeatures(features, features, valid), read_part(root, shard)[1])


def prepared(store: Path, name: str, device: torch.device, **changes: Any) -> Run:
    """A run of the small student over a store, ready for its first step."""
    student = store.parent / "student.json"
    student.write_text(json.dumps(STUDENT))
    base = {"store": store, "out": store.parent / name, "student": {"model": str(student)}, "batch_size": BATCH}
    config = RunConfig.model_validate(base | {"epochs": 10_000, "data": {"workers": 1}} | changes)
    return prepare(config, World(device))


def online(device: torch.device) -> Callable[[Batch], None]:
    """Nine teachers of the student's size, as `open_clip` would run them beside the training."""
    from mmkd.distill.config import StudentConfig

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


def stepper(run: Run, source: Iterator[Batch]) -> Callable[[], object]:
    """Steps that wait for their data."""
    return lambda: run.update(next(source))


def steps(root: Path, device: torch.device) -> list[Row]:
    """What a step costs beside the same step on ready tensors."""
    padded: dict[str, Any] = {"data": {"workers": 1, "bucket_batches": 0}}
    nine = prepared(root, "nine", device, **padded)
    one = prepared(root, "one", device, teachers=("t0",), **padded)
    none = prepared(root, "none", device, loss={"feature": 0, "cross": 0}, **padded)
    bank = prepared(root, "bank", device, loss={"bank": 1.0, "bank_rows": {"size": 1024, "refresh": BATCH}}, **padded)
    bucketed = prepared(root, "bucketed", device)
    ask = online(device)
    with ExitStack() as stack:
        data = [stack.enter_context(closing(run.batches.from_step(0))) for run in (nine, one, bucketed)]
        ready = next(data[0])
        first = replace(ready, targets=ready.targets[:1])
        # A bucketed batch is short or long by chance: sixteen of them are one window of all lengths.
        window = [next(data[2]) for _ in range(16)]
        found = medians(
            {
                "ready": lambda: nine.update(ready),
                "store": stepper(nine, data[0]),
                "one": lambda: one.update(first),
                "none": lambda: none.update(replace(ready, targets=())),
                "bank": lambda: bank.update(ready),
                "online": lambda: (ask(ready), nine.update(ready)),
            },
            device,
        )
        waited = [seconds(lambda: next(data[0]), device)]
        for _ in range(REPEATS):
            nine.update(ready)
            waited.append(seconds(lambda: next(data[0]), device))
        short = sum(seconds(lambda batch=batch: bucketed.update(batch), device) for batch in window) / len(window)  # type: ignore[misc]
    base = found["ready"]
    kind: Literal["cpu", "gpu"] = "gpu" if device.type == "cuda" else "cpu"
    step = f"step of {BATCH} pairs, {TEACHERS} teachers of {DIM}"

    def row(what: str, against: str, taken: float, reference: float, goal: str = "") -> Row:
        return Row(
            what=what, against=against, value=taken * 1e3, reference=reference * 1e3, unit="ms", goal=goal, device=kind
        )  # fmt: skip

    wait = statistics.median(waited[1:])
    return [
        row(f"{step}, images and features from disk", "the same on ready tensors", found["store"], base, "<= 1.02"),
        row(f"{step}, bank of 1,024 rows", "the same without a bank", found["bank"], base),
        row(step, "one teacher", base, found["one"], "<= 1.05"),
        row(step, "no teacher (stage 1)", base, found["none"]),
        row(step, "teachers online, each of the student's size", base, found["online"]),
        row("text bucketed by length", "padded to 77 tokens", short, base),
        Row(what="share of a step spent waiting for data", value=wait / (wait + base), device=kind),
    ]


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
        found = told.get(timeout=120)
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "steps" / "store", 4_096, TEACHERS, DIM)
        rows = steps(folder / "steps" / "store", device)
        return rows + (memory(folder) if Path("/proc/self/status").is_file() else [])


if __name__ == "__main__":
    main(measure)
