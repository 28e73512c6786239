"""Reports: what happened to one shard, and to a whole run as a user reads it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted
from mmkd.extract.overview import advice, reason_kind


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
    """`read` and `decode` (summed over threads), `samples`, and for each teacher `image SLUG`, `text SLUG` (the
    forward passes) and `write SLUG`."""
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
    """Worker name."""

    def count(self, samples: pa.Table) -> ShardReport:
        """Count the sample rows by status and by reason."""
        self.status = dict(Counter(samples["status"].to_pylist()))
        self.reasons = dict(Counter(reason for reason in samples["reason"].to_pylist() if reason))
        return self

    @property
    def failed(self) -> int:
        """Rows with an input that could not be used; duplicates and rows with one side are not failures."""
        harmless = ("key: ", "pair: ", "note: ", "row: no ")
        return sum(count for reason, count in self.reasons.items() if not reason.startswith(harmless))


class Clock:
    """`with clock("read"): ...` adds the seconds spent to a table."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a block under `name`."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add to `name`."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass
class RunReport:
    """Report on one run."""

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

    def lose(self, shard: int, reason: str, rows: int) -> None:
        """Note a shard that could not be done."""
        self.lost[shard] = reason
        self.lost_rows[f"shard lost: {reason}"] += rows

    def add(self, shard: ShardReport) -> None:
        """Count one finished shard."""
        self.shards_done += 1
        self.changed += shard.changed
        self.rows_read += shard.rows
        self.failed += shard.failed
        for reason, count in shard.reasons.items():
            self.reasons[reason_kind(reason)] += count
        for name in ("status", "seconds", "truncated", "not_finite"):
            getattr(self, name).update(getattr(shard, name))
        for place, rows in shard.batch_rows.items():
            self.batch_rows[place] = min(rows, self.batch_rows.get(place, rows))


def summary_lines(report: RunReport) -> Iterator[str]:
    """Yield the run's end as a user reads it."""
    yield f"extracted {report.shards_done} of {counted(report.shards_total, 'shard')} into {report.store}"
    if report.status:
        yield "rows: " + ", ".join(f"{count:,} {status}" for status, count in sorted(report.status.items()))
    for reason, count in report.reasons.most_common(10):
        yield f"  {count:,} x {reason}{advice(reason)}"
    for slug, count in sorted(report.truncated.items()):
        if count:
            yield f"  {counted(count, 'caption')} longer than the context of {slug}, and so cut"
    for slug, count in sorted(report.not_finite.items()):
        if count:
            yield f"  {counted(count, 'feature')} of {slug} zero or not finite: marked as missing"
    if report.changed:
        changed = counted(report.changed, "image")
        yield f"  {changed} changed since the store was made: marked as missing for the new teachers"
    for place, rows in sorted(report.batch_rows.items()):
        yield f"  {place}: batches of {rows} rows, more did not fit on the device"
    if report.seconds:
        yield "seconds, summed over workers: " + ", ".join(
            f"{name} {seconds:.1f}" for name, seconds in sorted(report.seconds.items())
        )
    for shard, reason in sorted(report.lost.items()):
        yield f"lost: shard {shard}: {reason}"
    if report.lost:
        yield "the other shards are done; run the same command again to try the lost ones once more"
