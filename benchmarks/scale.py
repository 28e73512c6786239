"""Stores of realistic size, 2.9 and 100 million rows x 9 teachers of 512 float16, folded: seconds and memory of every
operation. The files have their full length, true checksums and real values, but all packs are hard links to two of one
teacher (3 GB on disk for 54 GB and 1.8 TB): the page cache holds them all, so these figures include no disk time. The
text is synthetic. `--large N` sets the rows of the second store; 0 leaves it out.

Each step is a process of its own. Seconds do not count its imports; memory is the most private memory that it had over
what it had after them (mapped pages, which the kernel may take back, are not in it).
"""

from __future__ import annotations

import io
import multiprocessing
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mmkd.base.process import keep_freed_memory
from mmkd.benchmarks.linked_store import make_linked_store, sample_rows
from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.slow_s3 import slow_bucket
from mmkd.cli.main import cli
from mmkd.distill.batches import BatchPlan, Schedule
from mmkd.distill.captions import tokenize_captions
from mmkd.distill.pairs import PairSource, open_pairs
from mmkd.distill.student import student_tokenizer
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.distill.world import World
from mmkd.store import FeatureStore
from mmkd.store.inspect.info import store_info
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.writer import append_rows, first_new_row

ROWS, LARGE, TEACHERS, DIM = 2_900_000, 100_000_000, 9, 512
REQUEST_SECONDS = 0.03
MERGED, APPENDED = 65_536, 16_384
BATCH, SEED = 4096, 0
CONTEXT, TOKENISED = 77, 20_000
VERIFIED_SHARDS = 10

Told = tuple[float, float, str]
"""Seconds, MB, and a word about it."""


def private_mb() -> float:
    """Memory of this process that is its own."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


class Watch:
    """Seconds since it began and the most private memory since then, looked at every few milliseconds."""

    def __init__(self, every: float = 0.005) -> None:
        self._every = every
        self._before, self._most, self._over = private_mb(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._started = time.perf_counter()
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(self._every):
            self._most = max(self._most, private_mb())

    def told(self, note: str = "") -> Told:
        """What was found; the clock stops."""
        seconds = time.perf_counter() - self._started
        self._over.set()
        self._thread.join()
        return seconds, max(self._most, private_mb()) - self._before, note


def open_first_batch(root: Path) -> Told:
    """Open, and read a random batch of one teacher."""
    rows = np.random.default_rng(0).integers(0, ROWS, BATCH) % len(FeatureStore.open(root))
    watch = Watch()
    _ = FeatureStore.open(root).image("t0")[rows]
    return watch.told(f"{BATCH:,} rows of one teacher")


def every_row_of_every_teacher(root: Path) -> Told:
    """Map all arrays, and ask who is available."""
    watch = Watch()
    store = FeatureStore.open(root)
    for slug in store.teachers:
        _ = store.image(slug)[:1], store.text(slug)[:1]
    share = store.available().mean()
    return watch.told(f"{share:.1%} of the pairs available")


def info(root: Path) -> Told:
    """`mmkd store info`."""
    watch = Watch()
    found = store_info(FeatureStore.open(root))
    return watch.told(f"{sum(found.summary.status.values()):,} rows counted")


def verify_all(root: Path) -> Told:
    """`mmkd store verify`: every byte."""
    watch = Watch()
    report = FeatureStore.open(root).verify()
    assert report.sound, report.problems[:3]
    return watch.told(f"{report.entries:,} entries, every byte against its checksum")


def verify_sampled(root: Path) -> Told:
    """`mmkd store verify -n`: the bytes of some shards, and everything else."""
    watch = Watch()
    report = FeatureStore.open(root).verify(sample=VERIFIED_SHARDS)
    assert report.sound, report.problems[:3]
    return watch.told(f"every byte of {report.shards} of {report.all_shards} shards; all documents, entries and names")


def command(root: Path, *words: str) -> Told:
    """A command of the command line."""
    watch = Watch()
    with redirect_stdout(io.StringIO()):
        try:
            cli([*words], standalone_mode=False)
        except SystemExit as ended:  # `store diff` says with its status whether anything differs
            if ended.code:
                raise
    return watch.told()


def stats(root: Path) -> Told:
    """`mmkd store stats` with its default sample."""
    return command(root, "store", "stats", str(root))


def show(root: Path) -> Told:
    """`mmkd store show` of one row in the middle."""
    return command(root, "store", "show", str(root), str(len(FeatureStore.open(root)) // 2))


def report(root: Path) -> Told:
    """`mmkd store report`."""
    return command(root, "store", "report", str(root), str(root.parent / "report.html"))


def select(root: Path) -> Told:
    """`mmkd select` by a rule that looks at every feature."""
    return command(root, "select", str(root), "--name", "scale", "--rule", "cosine_fifth")


def word_tokens(texts: list[str]) -> torch.Tensor:
    """A tokenizer that costs next to nothing: a number for each word."""
    rows = np.zeros((len(texts), CONTEXT), dtype=np.int64)
    for row, text in zip(rows, texts, strict=True):
        words = text.split()[:CONTEXT]
        row[: len(words)] = [zlib.crc32(word.encode()) % 49_000 + 1 for word in words]
    return torch.from_numpy(rows)


def clip_tokens(root: Path) -> Told:
    """CLIP's tokenizer over some captions, as a run's first start has it over all."""
    store = FeatureStore.open(root)
    captions = store.sample_table(["caption"])["caption"].slice(0, TOKENISED).to_pylist()
    tokenizer = student_tokenizer("ViT-B-32")
    tokenizer(captions[:100])
    watch = Watch()
    tokenize_captions(captions, tokenizer)
    seconds, memory, _ = watch.told()
    minutes = seconds / len(captions) * len(store) / 60
    return seconds, memory, f"{len(captions):,} captions; {minutes:.1f} min for all, when a run first starts"


def plan_of(root: Path) -> BatchPlan:
    """What `mmkd distill` puts together before its first step, images and model apart."""
    store = FeatureStore.open(root)
    source = PairSource(store, "", tuple(store.teachers), None, word_tokens)
    pairs = open_pairs(root.parent / "run", source, World(torch.device("cpu")))
    TeacherFeatures(store, source.slugs, taught=pairs.bits)
    return BatchPlan(pairs.rows, Schedule(len(pairs.rows), BATCH, 2), SEED)


def begin(root: Path) -> Told:
    """From nothing to the first batch's rows."""
    watch = Watch()
    plan = plan_of(root)
    next(plan.steps(0))
    return watch.told(f"{len(plan.rows):,} pairs; tokenize_captions by a tokenizer that costs nothing")


def epoch(root: Path) -> Told:
    """The order of one epoch, all its batches, after the preparation."""
    plan = plan_of(root)
    watch = Watch()
    seen = np.concatenate([rows for *_, rows in islice(plan.steps(0), plan.schedule.steps_per_epoch)])
    told = watch.told(f"{plan.schedule.steps_per_epoch:,} batches of {BATCH:,}, each row once")
    assert len(np.unique(seen)) == len(seen)
    return told


def resume(root: Path) -> Told:
    """From nothing to the middle of the second epoch, as a run that was killed there does."""
    watch = Watch()
    plan = plan_of(root)
    middle = plan.schedule.steps_per_epoch * 3 // 2
    step, _, _, rows = next(plan.steps(middle))
    told = watch.told("its tokens read back; the very rows that the run without a stop has there")
    assert step == middle
    assert np.array_equal(rows, next(islice(plan.steps(0), middle, None))[3])
    return told


def gather(root: Path) -> Told:
    """A hundred batches of all teachers, both towers."""
    store = FeatureStore.open(root)
    keep_freed_memory()  # as the trainer does
    teachers = TeacherFeatures(store, tuple(store.teachers))
    rows = np.random.default_rng(1).integers(0, len(store), (100, BATCH))
    teachers.gather(rows[0])
    watch = Watch()
    for batch in rows:
        teachers.gather(batch)
    seconds, memory, _ = watch.told()
    size = 100 * BATCH * TEACHERS * 2 * DIM * 2 / 1e9
    return seconds, memory, f"{size / seconds:.1f} GB/s"


def diff(root: Path) -> Told:
    """`mmkd store diff` of the store with itself: everything is read twice."""
    return command(root, "store", "diff", str(root), str(root))


def tag(root: Path) -> Told:
    """`mmkd store tag`."""
    return command(root, "store", "tag", str(root), "measured")


def append(root: Path) -> Told:
    """A corpus of one shard is appended, as pending rows."""
    store = Store.open(root)
    first = first_new_row(store.record)
    index = sample_rows(range(first, first + APPENDED), APPENDED, True)
    corpus = CorpusRecord(kind="benchmark", location="-", root="/", rows=APPENDED, digest="another")
    watch = Watch()
    append_rows(store, corpus, index)
    return watch.told(f"{APPENDED:,} rows")


def merge(root: Path) -> Told:
    """`mmkd store merge` of two stores, whose features are copied."""
    parts = [root.parent / name for name in ("one", "other")]
    for part in parts:
        make_linked_store(part, MERGED, TEACHERS, DIM, prefix=part.name)
    seconds, memory, _ = command(root, "store", "merge", *map(str, parts), str(root.parent / "both"))
    size = 2 * MERGED * TEACHERS * 2 * DIM * 2 / 1e9
    return seconds, memory, f"2 x {MERGED:,} rows, {size:.1f} GB, really copied and packed: {size / seconds:.2f} GB/s"


def remote_info(root: Path) -> Told:
    """Open, and `mmkd store info`, behind an S3 server that lets each request wait."""
    with slow_bucket(root.parent, REQUEST_SECONDS) as bucket:
        watch = Watch()
        store = FeatureStore.open(f"{bucket}/{root.name}")
        opened = len(store.ledger), watch.told()[0]
        store_info(store)
        return watch.told(f"{REQUEST_SECONDS * 1e3:.0f} ms a request; opened, {opened[0]:,} entries: {opened[1]:.2f} s")


@dataclass(frozen=True)
class Step:
    """One process. `full`: only at the size of a real machine; `large`: also on the large store."""

    act: Callable[[Path], Told]
    goal: str = ""
    full: bool = False
    large: bool = True


STEPS: dict[str, Step] = {
    "opened, first batch": Step(open_first_batch, "< 1"),
    "all arrays mapped, `available()`": Step(every_row_of_every_teacher),
    "`store info`": Step(info, "< 2"),
    "`store info` behind S3": Step(remote_info, "< 5"),
    "`store verify`, every byte": Step(verify_all, full=True, large=False),
    f"`store verify -n {VERIFIED_SHARDS}`": Step(verify_sampled),
    "`store stats`": Step(stats),
    "`store show`": Step(show, large=False),
    "`store report`": Step(report, full=True, large=False),
    "`select --rule cosine_fifth`": Step(select, large=False),
    "CLIP's tokenizer": Step(clip_tokens, large=False),
    "training prepared, first start": Step(begin, large=False),
    "an epoch's order": Step(epoch, large=False),
    "training resumed in the middle of the second epoch": Step(resume, large=False),
    "100 batches of all teachers": Step(gather),
    "`store tag`": Step(tag),
    "`store diff`": Step(diff),
    "`store merge`": Step(merge, large=False),
    "`store append`": Step(append),  # last: the store is another one then
}


@contextmanager
def linked_store(rows: int, workers: int = 1) -> Iterator[Path]:
    """The store, for as long as the block."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        make_linked_store(root, rows, TEACHERS, DIM, workers)
        yield root


def step_rows(root: Path, rows: int, full: bool) -> Iterator[Row]:
    """A row of the page for each step, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    for name, step in STEPS.items():
        if (step.full and not full) or (rows > ROWS and not step.large):
            continue
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            seconds, memory, note = pool.submit(partial(step.act, root)).result()
        told = f"{memory:,.0f} MB; {note}"
        print(f"{name}, {rows:,} rows: {seconds:.3g} s, {told}", file=sys.stderr, flush=True)
        yield Row(what=f"{name}, {rows:,} rows", value=seconds, unit="s", goal=step.goal, note=told)


def size_rows(rows: int, full: bool) -> Iterator[Row]:
    """All that is measured of one size."""
    started = time.perf_counter()
    with linked_store(rows) as root:
        files = sum(path.is_file() for path in root.rglob("*"))
        note = f"laid out in {time.perf_counter() - started:.0f} s"
        goal = {ROWS: "< 700", LARGE: "< 20000"}.get(rows, "")
        yield Row(what=f"files of the store, {rows:,} rows x {TEACHERS} teachers", value=files, goal=goal, note=note)
        yield from step_rows(root, rows, full)


def measure(full: bool, large: int = LARGE) -> list[Row]:
    """Rows for the page; the size is the true one either way."""
    with tempfile.TemporaryDirectory() as folder:
        record = make_linked_store(Path(folder) / "store", ROWS, TEACHERS, 8, workers=512)
        files = sum(path.is_file() for path in Path(folder).rglob("*"))
    note = f"{record.rows_per_shard:,} rows in a shard"
    what = f"files of the store, {ROWS:,} rows x {TEACHERS} teachers, extracted by 512 workers"
    found = [Row(what=what, value=files, goal="< 700", note=note), *size_rows(ROWS, full)]
    return [*found, *(size_rows(large, full) if large else ())]


if __name__ == "__main__":
    main(measure, large=LARGE)
