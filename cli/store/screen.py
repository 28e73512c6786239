"""Lines of `mmkd store info`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from shlex import quote
from typing import TYPE_CHECKING

from mmkd.base.text import bytes_text, counted, seconds_text
from mmkd.store.inspect.coverage import shard_ranges
from mmkd.store.inspect.findings import store_findings

if TYPE_CHECKING:
    from mmkd.store.inspect.activity import Activity
    from mmkd.store.inspect.findings import Finding
    from mmkd.store.inspect.info import StoreInfo

REASONS = 10
"""Failure reasons on the screen; `--json` has all."""


def prints_blocks() -> bool:
    """True when the terminal's encoding has the map's block characters."""
    try:
        "█▓░·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def info_lines(info: StoreInfo, ascii_only: bool = False) -> Iterator[str]:
    """One screen about a store."""
    summary = info.summary
    status = ", ".join(f"{count:,} {name}" for name, count in summary.status.items())
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    yield summary.root
    yield f"corpus    {summary.corpus} ({info.corpus_kind}), indexed {summary.created}"
    yield f"made by   {versions}"
    yield f"rows      {summary.rows:,} ({status}) in {counted(summary.shards, 'shard')} of {summary.rows_per_shard:,}"
    bytes_in_all = summary.sample_bytes + sum(teacher.bytes for teacher in summary.teachers.values())
    yield f"bytes     {bytes_text(bytes_in_all)}, {bytes_text(summary.sample_bytes)} of them samples"
    if summary.reasons:
        yield f"failures  {counted(sum(summary.reasons.values()), 'row')}"
    yield from (f"  {count:,} x {reason}" for reason, count in list(summary.reasons.items())[:REASONS])
    if len(summary.reasons) > REASONS:
        yield f"  and {counted(len(summary.reasons) - REASONS, 'more reason')}; --json has all"
    yield f"teachers  {len(summary.teachers)}"
    yield from _teacher_lines(info)
    yield from _map_lines(info, ascii_only)
    for selection in info.selections:
        yield f"selection {selection.name}: {selection.kept:,} of {counted(selection.available, 'pair')} kept"
    yield from _activity_lines(info.activity, summary.complete)
    yield from finding_lines(store_findings(info))
    yield f"features were not looked at; next: mmkd store stats {quote(summary.root)}"


def _teacher_lines(info: StoreInfo) -> Iterator[str]:
    summary = info.summary
    width = max(map(len, summary.teachers), default=0)
    for slug, teacher in summary.teachers.items():
        card = info.cards[slug]
        yield (
            f"  {slug:{width}}  {teacher.shards_done}/{counted(summary.shards, 'shard')}  "
            f"{counted(teacher.image_rows, 'image')}  {counted(teacher.text_rows, 'text')}  "
            f"{card.dim} x {card.encoding}  {bytes_text(teacher.bytes)}  "
            f"digest {teacher.digest}  {card.source}"
        )


def _map_lines(info: StoreInfo, ascii_only: bool) -> Iterator[str]:
    if not info.summary.teachers or not info.summary.shards:
        return
    legend = "# sound  + most of it  - less  . missing" if ascii_only else "█ sound  ▓ most of it  ░ less  · missing"
    last = info.summary.shards - 1
    yield f"shards    {f'0 to {last}' if last else '0'}: {legend}"
    width = max(map(len, info.summary.teachers))
    for slug in info.summary.teachers:
        holes = info.coverage.holes(slug)
        missing = f"  lacks {shard_ranges(holes)}" if holes else ""
        yield f"  {slug:{width}}  {info.coverage.line(slug, ascii_only=ascii_only)}{missing}"


def _activity_lines(activity: Activity, complete: bool) -> Iterator[str]:
    if activity.seconds:
        shared = [f"{name} {seconds_text(activity.seconds[name])}" for name in activity.seconds if " " not in name]
        phases = ", ".join(shared) or "forward passes only"
        yield f"seconds   summed over workers, {counted(activity.runs, 'run')}: {phases}"
        for slug, towers in activity.by_teacher().items():
            yield f"  {slug}: " + ", ".join(f"{tower} {seconds_text(spent)}" for tower, spent in towers.items())
    if activity.last_write is not None and activity.seconds_ago is not None:
        ago = seconds_text(activity.seconds_ago)
        going_on = "; a run is probably going on" if activity.running else ""
        yield f"written   {activity.last_write}, {ago} ago{going_on}"
    if not complete and not activity.running:
        yield "not complete: run the same `mmkd extract` command again to go on"


def finding_lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Findings, faults first."""
    for finding in sorted(findings, key=lambda finding: finding.severity):
        yield f"{finding.severity:7}  {finding.text}"
        yield f"         see: {finding.command}"
