"""What one run did, and how a user reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted
from mmkd.extract.overview import advice, reason_kind
from mmkd.extract.shard_report import ShardReport


@dataclass
class RunReport:
    """What one run did."""

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
    """The run's end as a user reads it."""
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
