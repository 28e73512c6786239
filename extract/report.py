"""Reports: what a corpus holds as the index lists it, what happened to one shard, and to a whole run."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from mmkd.base.arithmetic import arithmetic_text
from mmkd.base.config import read_mapping
from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted
from mmkd.extract.corpora import Ignored
from mmkd.store import TeacherCard
from mmkd.store.layout import TOWER_INPUTS

_ADVICE = read_mapping(Path(__file__).with_name("advice.yaml"))
"""What to do about a reason, by its beginning."""


def _reason_kind(reason: str) -> str:
    """Return a reason without what differs between equal causes, so that they can be counted."""
    return re.sub(r"of row \d+", "of an earlier row", reason)


def _advice(reason: str) -> str:
    return next((f" ({text})" for beginning, text in _ADVICE.items() if reason.startswith(beginning)), "")


@dataclass
class Overview:
    """Counts of a corpus as the index lists it."""

    rows: int = 0
    images: int = 0
    """Rows with an image; of a shared image, each row."""
    captions: int = 0
    pairs: int = 0
    further: int = 0
    """Distinct captions beside the first ones: rows behind the others."""
    texts: int = 0
    """Rows that are a text on purpose, such as a prompt."""
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Rows with a fault known before anything is read: number and first key, by reason."""
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Inputs without a row: number and first name, by reason."""

    def add_row(self, key: str, image: bool, caption: bool, reason: str | None, is_text: bool = False) -> None:
        self.rows += 1
        self.images += image
        self.captions += caption
        self.pairs += image and caption
        self.texts += is_text
        if reason is not None:
            kind = _reason_kind(reason)
            count, example = self.reasons.get(kind, (0, key))
            self.reasons[kind] = count + 1, example

    def ignore(self, one: Ignored) -> None:
        count, example = self.ignored.get(one.reason, (0, one.example))
        self.ignored[one.reason] = count + one.count, example

    def lines(self, teachers: Sequence[TeacherCard] = ()) -> Iterator[str]:
        """Yield the overview as a user reads it, at most ten lines for each of faults and ignored inputs, and those of
        `teachers` that find nothing to encode."""
        counts = {"image": self.images, "caption": self.captions - self.texts, "pair": self.pairs}
        one_sided = counts["image"] + counts["caption"] - 2 * self.pairs
        texts = f", {counted(self.texts, 'text')} without an image on purpose" if self.texts else ""
        paired = self.images and self.captions
        sides = f", {counted(one_sided, 'row')} with one side" if one_sided and paired else ""
        more = f", {counted(self.further, 'further caption')}" if self.further else ""
        yield f"corpus: {', '.join(counted(count, noun) for noun, count in counts.items())}{more}{texts}{sides}"
        for card in teachers:
            if not any({"image": self.images, "text": self.captions}[tower] for tower in card.towers):
                yield f"  no features by {card.slug}: it encodes {TOWER_INPUTS[card.towers[0]]} only, there are none"
        for what, found in (("", self.reasons), ("ignored: ", self.ignored)):
            for reason, (count, example) in sorted(found.items(), key=lambda item: -item[1][0])[:10]:
                short = example if len(example) <= 80 else f"{example[:40]}...{example[-37:]}"
                shown = short if short.isprintable() else repr(short)
                yield f"  {what}{count:,} x {reason}, such as {shown}{_advice(reason)}"
            if len(found) > 10:
                yield f"  {what}{len(found) - 10} further reasons"


@dataclass
class ShardReport:
    """Report on one shard, sent to the client and the run's log."""

    shard: int
    teachers: tuple[str, ...]
    rows: int = 0
    """Rows whose inputs were read: those of the shard, or those that were tried again."""
    status: dict[str, int] = field(default_factory=dict)
    """Rows by status."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Failed and partial rows by reason."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`read`, `decode` (summed over threads), `await-read`, `await-decode` (for images of what took longer), `tokens`,
    `device` (for features), `samples`; by teacher `image SLUG`, `text SLUG` (of the device), `write SLUG`."""
    flops: dict[str, float] = field(default_factory=dict)
    """Floating-point operations of `image SLUG` and `text SLUG`, of loaders that count them."""
    peak: tuple[float, str] = (0.0, "")
    """TFLOP/s of the worker's device, and where that is known from; 0.0 where it is not."""
    wall_seconds: float = 0.0
    truncated: dict[str, int] = field(default_factory=dict)
    """Captions longer than the teacher's context, by slug."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Features of sound inputs that came out NaN, infinite or zero, by slug."""
    changed: int = 0
    """Images changed since another teacher read this shard."""
    batch_rows: dict[str, int] = field(default_factory=dict)
    """`image SLUG` or `text SLUG`: rows of a batch after larger batches did not fit the device."""
    worker: str = ""

    def count(self, samples: pa.Table) -> "ShardReport":
        self.status = dict(Counter(samples["status"].to_pylist()))
        self.reasons = dict(Counter(reason for reason in samples["reason"].to_pylist() if reason))
        return self

    @property
    def failed(self) -> int:
        """Rows with an input that could not be used; duplicates and rows with one side are not failures."""
        harmless = ("key: ", "pair: ", "note: ", "row: no ")
        return sum(count for reason, count in self.reasons.items() if not reason.startswith(harmless))


@dataclass
class Clock:
    """`with clock("read"): ...` adds the seconds spent to a table."""

    seconds: dict[str, float]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass
class RunReport:
    store: StorePath
    rows: int
    shards_total: int
    shards_done: int = 0
    """Shards that this run finished; those that were there before are not counted."""
    rows_read: int = 0
    status: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    """Summed over workers and threads; see `ShardReport.seconds`."""
    flops: Counter[str] = field(default_factory=Counter)
    peak: tuple[float, str] = (0.0, "")
    truncated: Counter[str] = field(default_factory=Counter)
    not_finite: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    failed: int = 0
    batch_rows: dict[str, int] = field(default_factory=dict)
    """`image SLUG` or `text SLUG`: the smallest batch that a worker had to go down to."""
    lost: dict[int, str] = field(default_factory=dict)
    """Shards that could not be done, and why; everything else went on."""
    lost_rows: Counter[str] = field(default_factory=Counter)
    """Rows of these shards, by reason."""

    def add(self, shard: ShardReport) -> None:
        self.shards_done += 1
        self.changed += shard.changed
        self.rows_read += shard.rows
        self.failed += shard.failed
        for reason, count in shard.reasons.items():
            self.reasons[_reason_kind(reason)] += count
        self.peak = max(self.peak, shard.peak)
        for name in ("status", "seconds", "flops", "truncated", "not_finite"):
            getattr(self, name).update(getattr(shard, name))
        for place, rows in shard.batch_rows.items():
            self.batch_rows[place] = min(rows, self.batch_rows.get(place, rows))


def summary_lines(report: RunReport) -> Iterator[str]:
    yield f"extracted {report.shards_done} of {counted(report.shards_total, 'shard')} into {report.store}"
    if report.status:
        yield "rows: " + ", ".join(f"{count:,} {status}" for status, count in sorted(report.status.items()))
    for reason, count in report.reasons.most_common(10):
        yield f"  {count:,} x {reason}{_advice(reason)}"
    for slug, count in sorted((+report.truncated).items()):
        yield f"  {counted(count, 'caption')} longer than the context of {slug}, and so cut"
    for slug, count in sorted((+report.not_finite).items()):
        yield f"  {counted(count, 'feature')} of {slug} zero or not finite: marked as missing"
    if report.changed:
        changed = counted(report.changed, "image")
        yield f"  {changed} changed since the store was made: marked as missing for the new teachers"
    for place, rows in sorted(report.batch_rows.items()):
        yield f"  {place}: batches of {rows} rows, more did not fit on the device"
    if report.seconds:
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in sorted(report.seconds.items()))
        yield f"seconds, summed over workers: {steps}"
        yield limit_line(report.seconds)
    if flops := +report.flops:
        rate = flops.total() / sum(report.seconds[name] for name in flops)
        yield f"arithmetic: {arithmetic_text(rate, *report.peak)}"
    for shard, reason in sorted(report.lost.items()):
        yield f"lost: shard {shard}: {reason}"
    if report.lost:
        yield "the other shards are done; run the same command again to try the lost ones once more"


_LIMITS = {
    "reading": "raise worker.read_threads, or use a faster disk, or tars instead of single files",
    "decoding": "raise worker.decode_threads, start more workers, or store the images smaller",
    "tokenizing": "raise worker.shards_at_once, so that one shard is tokenized while the other has the device",
    "forward passes": "use more or faster devices, or half precision (worker.autocast: true)",
    "writing": "use a faster disk for the store, or raise worker.shards_at_once",
}


def limit_line(seconds: Mapping[str, float]) -> str:
    """Return what most of the time of `ShardReport.seconds` went to, and what to change."""
    spent = dict.fromkeys(_LIMITS, 0.0)
    names = {"await-read": "reading", "await-decode": "decoding", "tokens": "tokenizing", "device": "forward passes"}
    for name, value in seconds.items():
        if what := "writing" if name == "samples" or name.startswith("write ") else names.get(name):
            spent[what] += value
    worst = max(spent, key=lambda what: spent[what])
    share = spent[worst] / max(sum(spent.values()), 1e-9)
    return f"limited by {worst}: {share:.0%} of the time; {_LIMITS[worst]}"
