"""Comparison with the original release on the same data: its layout (`meta.jsonl`, and for each sample a JPEG, a JSON
and two `.pt` files of float32 features of all its teachers) and its loader, both reimplemented from their
description, not from its code. Features are random, with 6.6 of nine teachers per sample; the store is what `mmkd
store import` makes of that folder.

The original's loader reads a sample's whole file and keeps one teacher drawn at random; its order is that of
`meta.jsonl`, as released; both sides have two worker processes. How the release extracts is not published: a kill is
compared for a writer that saves each `.pt` in place, as `torch.save` does. Files are in the page cache throughout.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmkd.base.process import keep_freed_memory
from mmkd.benchmarks.released_layout import FOLDER, WIDTHS, ReleasedRows, cropped, features_of, write_release
from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.scale import private_mb
from mmkd.distill.batches import BatchPlan, Schedule, one_ahead
from mmkd.distill.image_places import ImagePlaces
from mmkd.distill.images import CorpusImages, image_batches
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.store import FeatureStore
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.original import OriginalRelease
from mmkd.store.layout import PAIR_SOUND, Encoding
from mmkd.store.ledger import remove_entry
from mmkd.store.samples import read_part
from mmkd.store.writer import ShardFeatures, write_shard

BATCH, WORKERS, STEP_SECONDS, REPEATS = 128, 2, 0.05, 3
KILLS = 20


def released_epoch(root: Path, images: bool) -> Iterator[Any]:
    """Batches of the released loader."""
    yield from DataLoader(ReleasedRows(root, images), BATCH, num_workers=WORKERS, drop_last=True)


def our_epoch(store: Path, images: bool) -> Iterator[Any]:
    """Batches of ours, shuffled, with all teachers, images and features by what `mmkd distill` reads them with."""
    opened = FeatureStore.open(store)
    teachers = TeacherFeatures(opened, tuple(opened.teachers))
    plan = plan_of(teachers)
    wanted = [(epoch, rows) for _, epoch, _, rows in plan.steps(0)]
    pixels: Iterator[Any] = repeat(None)
    if images:
        places = ImagePlaces.of(opened.sample_table(["row", "uri", "offset", "length"]))
        pixels = image_batches(CorpusImages(opened, places), cropped, wanted, seed=0, workers=WORKERS)
    yield from one_ahead((next(pixels), teachers.gather(rows)) for _, rows in wanted)


def plan_of(teachers: TeacherFeatures) -> BatchPlan:
    """One epoch."""
    rows = np.flatnonzero(teachers.any_available())
    return BatchPlan(rows, Schedule(len(rows), BATCH, 1), 0)


def epoch_seconds(batches: Iterator[Any], step: float) -> tuple[float, float]:
    """Seconds of an epoch whose steps take `step`, and the share of them that is spent waiting for data."""
    waited, started = 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        found = next(batches, None)
        waited += time.perf_counter() - asked
        if found is None:
            break
        time.sleep(step)
    seconds = time.perf_counter() - started
    return seconds, waited / seconds


def compare_epochs(root: Path, store: Path) -> Iterator[Row]:
    """Features alone, with images, and the wait of a step that takes a while."""
    for what, images, step in (
        ("epoch, features alone", False, 0.0),
        ("epoch, images and features", True, 0.0),
        (f"epoch, features alone, steps of {STEP_SECONDS * 1e3:.0f} ms", False, STEP_SECONDS),
    ):
        ours, theirs = [], []
        for _ in range(REPEATS):
            theirs.append(epoch_seconds(released_epoch(root, images), step))
            ours.append(epoch_seconds(our_epoch(store, images), step))
        mine, other = (statistics.median(found[0] for found in taken) for taken in (ours, theirs))
        note = "ours: all teachers of a sample, shuffled; theirs: one teacher, in file order"
        if step:
            shares = [statistics.median(found[1] for found in taken) for taken in (ours, theirs)]
            note = f"waiting for data {shares[0]:.0%} of the time, theirs {shares[1]:.0%}"
        yield Row(what=what, against="the released loader", value=mine, reference=other, unit="s", note=note)


def bytes_and_files(root: Path, pattern: str) -> tuple[float, float]:
    """MB as the file system counts them (blocks of 512 bytes), and files."""
    files = [path for path in root.rglob(pattern) if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files) / 1e6, len(files)


def compare_disk(folder: Path, rows: int) -> Iterator[Row]:
    """Bytes and files of the features; images and their labels are apart from both."""
    release = folder / "release"
    whole, files = bytes_and_files(release, "*.pt")
    half, _ = bytes_and_files(release, "clips_project_output.pt")
    note = "projections are applied on the device and not stored twice; rows of absent teachers take room"
    for name, encoding in (("clips_output", "float16"), ("int8", "int8")):
        ours, our_files = bytes_and_files(folder / name, "*")
        what = f"disk, {rows:,} samples, features as the teachers gave them, {encoding}"
        against = "its two float32 files a sample"
        yield Row(what=what, against=against, value=ours, reference=whole, unit="MB", goal="<= 0.25", note=note)
    small, our_files = bytes_and_files(folder / "clips_project_output", "*")
    what = "disk, features of width 512 alone, float16"
    yield Row(what=what, against="`clips_project_output.pt`", value=small, reference=half, unit="MB")
    note = "a shard is an eighth of the rows here and 16,384 rows in a large store: see `scale`"
    yield Row(what="feature files", against="its `.pt` files", value=our_files, reference=files, note=note)


def index_rows(lines: int) -> Iterator[Row]:
    """What a loader's process has to hold before its first batch."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place = f"features/{FOLDER}/x/x"
        line: dict[str, Any] = {"folderid": FOLDER, "imgpath": f"{place}.jpg", "metapath": f"{place}.json"}
        line |= {"txt": "a finding of the lung, with an arrow " * 3, "available_clips": list(WIDTHS)[:6]}
        with (root / "meta.jsonl").open("w") as out:
            out.writelines(json.dumps(line | {"id": f"{row:032x}"}) + "\n" for row in range(lines))
        before, started = private_mb(), time.perf_counter()
        held = ReleasedRows(root, images=False)
        seconds, memory = time.perf_counter() - started, private_mb() - before
    scale = 2_900_000 / len(held)
    note = f"{memory:.0f} MB; {seconds * scale:.0f} s and {memory * scale / 1e3:.1f} GB a process at 2.9 million"
    yield Row(
        what=f"`meta.jsonl` of {lines:,} lines read, in every process", value=seconds, unit="s",
        note=f"{note}; ours: see `scale`",
    )  # fmt: skip


def resumed_as_released(steps: int, killed: int) -> tuple[int, int]:
    """Batches seen twice and never in an epoch that is killed after `killed` steps and gone on with.

    The release counts the steps that were done without drawing their batches: it starts at the first batch again.
    """
    batches = iter(range(steps))
    seen = list(range(killed)) + [next(batches) for step in range(steps) if step >= killed]
    return len(seen) - len(set(seen)), steps - len(set(seen))


def resumed_as_ours(plan: BatchPlan, killed: int) -> tuple[int, int]:
    """The same of ours, from the plan that a new process makes."""
    steps = list(plan.steps(0))
    rows = np.concatenate([step[3] for step in steps[:killed]] + [step[3] for step in plan.steps(killed)])
    every = np.concatenate([step[3] for step in steps])
    twice = len(rows) - len(np.unique(rows))
    return twice, len(np.setdiff1d(every, rows))


def compare_resume(store: Path) -> Iterator[Row]:
    """Killed in the middle of an epoch."""
    opened = FeatureStore.open(store)
    plan = plan_of(TeacherFeatures(opened, tuple(opened.teachers)))
    steps = plan.schedule.steps_per_epoch
    again, never = resumed_as_released(steps, steps // 2)
    twice, missed = resumed_as_ours(plan, steps // 2)
    released = f"{again / steps:.0%} twice and {never / steps:.0%} never by the released loader"
    yield Row(
        what="share of an epoch's samples seen twice after a kill at its half", value=twice / (steps * BATCH),
        goal="<= 0", note=f"never seen: {missed / (steps * BATCH):.0%}; {released}",
    )  # fmt: skip


def save_for_ever(folder: Path) -> None:
    """A writer in the original's layout."""
    rng = np.random.default_rng(0)
    for number in range(10**9):
        place = folder / f"{number % 64}"
        place.mkdir(exist_ok=True)
        torch.save(features_of(WIDTHS, None, rng), place / "clips_output.pt")


def extract_for_ever(root: Path) -> None:
    """A writer of ours: shards of one teacher, again and again."""
    store = FeatureStore.open(root)
    slug, card = next(iter(store.teachers.items()))
    rng = np.random.default_rng(0)
    for number in range(10**9):
        shard = number % store.shards
        rows = len(store.record.shard_rows(shard))
        values = rng.standard_normal((rows, card.dim), dtype=np.float32)
        valid = np.full(rows, PAIR_SOUND, dtype=np.uint8)
        samples = read_part(root, shard)[1]
        remove_entry(root, shard, slug)  # as a retry does: nothing vouches for files that are about to change
        write_shard(store, card, shard, ShardFeatures(values, values, valid), samples)


def killed_writers(write: Callable[[Path], None], place: Path, broken: Callable[[Path], int]) -> int:
    """Kill -9 a writer at a random moment, many times; broken things that a reader would take for whole."""
    context = multiprocessing.get_context("fork")
    found = 0
    for number in range(KILLS):
        process = context.Process(target=write, args=(place,))
        process.start()
        time.sleep(0.15 + random.Random(number).random() * 0.25)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found += broken(place)
    return found


def unreadable_files(folder: Path) -> int:
    """`.pt` files that cannot be loaded: the loader ends at the first of them."""
    count = 0
    for path in folder.rglob("*.pt"):
        try:
            torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, OSError):
            path.unlink()
            count += 1
    return count


def false_entries(root: Path) -> int:
    """Shards that the ledger vouches for and that are not what it says."""
    return len(FeatureStore.open(root).verify().findings)


def compare_kills(store: Path, folder: Path) -> Iterator[Row]:
    """Writers killed."""
    folder.mkdir()
    theirs = killed_writers(save_for_ever, folder, unreadable_files)
    ours = killed_writers(extract_for_ever, store, false_entries)
    yield Row(
        what=f"broken data that passes for whole after {KILLS} kills of a writer", value=ours, goal="<= 0",
        note=f"files saved in place: {theirs}",
    )  # fmt: skip


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    rows = 50_000 if full else 2_048
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_release(folder / "release", rows)
        native, projected = folder / "clips_output", folder / "clips_project_output"
        imports: tuple[tuple[Path, str, Encoding], ...] = (
            (native, "clips_output", "float16"),
            (projected, "clips_project_output", "float16"),
            (folder / "int8", "clips_output", "int8"),
        )
        for out, file, encoding in imports:
            import_features(OriginalRelease(folder / "release", file), out, encoding, lambda done, every: None)
        found = list(compare_disk(folder, rows))
        found += compare_epochs(folder / "release", projected)
        found += index_rows(1_000_000 if full else 100_000)
        found += compare_resume(projected)
        found += compare_kills(native, folder / "killed")
    return found


if __name__ == "__main__":
    main(measure)
