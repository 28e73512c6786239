"""Findings that argue against training: a sentence each, with the command that shows more."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Literal

from mmkd.base.text import counted
from mmkd.store.inspect.agreement import Agreement
from mmkd.store.inspect.coverage import shard_ranges
from mmkd.store.inspect.info import StoreInfo
from mmkd.store.inspect.pairs import PairStatistics
from mmkd.store.inspect.statistics import StoreStatistics
from mmkd.store.inspect.towers import TowerStatistics
from mmkd.store.layout import TOWER_INPUTS

Severity = Literal["fault", "warning"]
"""`fault`: wrong, do not train before it is fixed. `warning`: look at it."""

FAILED_SHARE = 0.01
"""Failed or partial rows beyond this share are worth a look."""
COLLAPSED_COSINE = 0.98
"""Mean cosine between different rows above which an encoder tells hardly anything apart; sound CLIP encoders have
0.1 to 0.8."""
EQUAL_CKA, EQUAL_MUTUAL = 0.999, 0.95
FEW_ROWS = 100
"""Below it the tests that rest on chance are left out."""


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    severity: Severity
    text: str
    command: str


def store_findings(info: StoreInfo) -> Iterator[Finding]:
    """Find holes and failures in the ledger and the sample table."""
    root = quote(info.summary.root)
    if not info.cards:
        yield Finding("fault", "no teacher has been run: the store holds rows and no features", "mmkd extract")
    for slug in info.coverage.teachers:
        if holes := info.coverage.holes(slug):
            count = sum(last - first + 1 for first, last in holes)
            state = "being written" if info.activity.running else "missing"
            text = f"{slug} lacks {count} of {info.summary.shards} shards ({shard_ranges(holes)}): {state}"
            command = f"mmkd store show {root} shard:{holes[0][0]}"
            yield Finding("warning" if info.activity.running else "fault", text, command)
    failed = sum(info.summary.status.get(name, 0) for name in ("failed", "partial"))
    if failed > FAILED_SHARE * max(info.summary.rows, 1):
        text = f"{counted(failed, 'row')} ({failed / info.summary.rows:.1%}) failed in part or whole"
        yield Finding("warning", text, f"mmkd store info {root} --json")


def statistics_findings(statistics: StoreStatistics) -> Iterator[Finding]:
    """Find broken rows, dead dimensions, collapse, captions that do not fit, equal teachers."""
    root = quote(statistics.root)
    command = f"mmkd store stats {root}"
    for tower in statistics.towers:
        see = f"mmkd store show {root} row:{tower.broken_rows[0]}" if tower.broken_rows else command
        for severity, text in _tower(tower):
            yield Finding(severity, f"{tower.slug} {tower.tower}: {text}", see)
    for pairs in statistics.pairs:
        if pairs.pairs >= FEW_ROWS and (fault := _mismatch(pairs)):
            yield Finding("fault", f"{pairs.slug}: {fault}", f"{command} --teachers {pairs.slug}")
    yield from _repeats(statistics, root)
    for matrix in statistics.agreement:
        for text in _equal(matrix):
            yield Finding("warning", text, command)


def _tower(tower: TowerStatistics) -> Iterator[tuple[Severity, str]]:
    if broken := tower.not_finite + tower.zero:
        rows = ", ".join(map(str, tower.broken_rows[:5])) + (", ..." if broken > 5 else "")
        bad = f"{counted(tower.not_finite, 'row')} not finite and {tower.zero:,} zero"
        yield "fault", f"{bad} although called sound (row {rows})"
    if tower.rows < FEW_ROWS:
        return
    for name, dimensions in (("dead", tower.dead_dimensions), ("constant", tower.constant_dimensions)):
        if dimensions:
            listed = ", ".join(map(str, dimensions[:8])) + (", ..." if len(dimensions) > 8 else "")
            yield "warning", f"{counted(len(dimensions), f'{name} dimension')} of {tower.width} ({listed})"
    if tower.mean_cosine > COLLAPSED_COSINE:
        yield "fault", f"collapsed: different rows have a mean cosine of {tower.mean_cosine:.3f}"


def _mismatch(pairs: PairStatistics) -> str | None:
    """Return how the captions do not fit the images; None if they do."""
    if pairs.best_shift:
        return (
            f"captions are shifted by {pairs.best_shift:+d}: images have a mean cosine of "
            f"{pairs.shift[pairs.best_shift]:.3f} with that row's caption, {pairs.shift[0]:.3f} with their own"
        )
    for way in ("i2t", "t2i"):
        reached, chance = pairs.recall[f"{way}@10"], pairs.chance[f"{way}@10"]
        if reached < chance + 3 * math.sqrt(chance * (1 - chance) / (pairs.pool * pairs.pools)):
            pools = f"in pools of {pairs.pool}, chance is {chance:.1%}"
            return f"captions do not fit images: {way} R@10 is {reached:.1%} {pools}"
    return None


def _repeats(statistics: StoreStatistics, root: str) -> Iterator[Finding]:
    """Yield equal image features of unequal files; teachers that repeat the same rows are named together."""
    alike: dict[tuple[int, tuple[tuple[int, ...], ...]], list[str]] = {}
    for tower in statistics.towers:
        if tower.tower == "image" and tower.repeats and tower.repeated_rows > statistics.repeated_images:
            alike.setdefault((tower.repeated_rows, tower.repeats), []).append(tower.slug)
    files = "although the files differ" if statistics.known_images else "(files not hashed)"
    for (count, groups), slugs in alike.items():
        rows = ", ".join(map(str, groups[0]))
        text = f"{counted(count, 'row')} with an earlier row's image feature {files}: rows {rows}"
        yield Finding("warning", f"{', '.join(slugs)}: {text}", f"mmkd store show {root} row:{groups[0][0]}")


def _equal(matrix: Agreement) -> Iterator[str]:
    """Yield groups of teachers that cannot be distinguished, each group once."""
    same = (matrix.rows >= FEW_ROWS) & (matrix.cka > EQUAL_CKA) & (matrix.mutual > EQUAL_MUTUAL)
    left = list(range(len(matrix.teachers)))
    while left:
        first = left.pop(0)
        alike = [j for j in left if same[first, j]]
        left = [j for j in left if j not in alike]
        if alike:
            names = " and ".join(matrix.teachers[j] for j in (first, *alike))
            least = float(matrix.cka[first, alike].min())
            yield f"{names} see {TOWER_INPUTS[matrix.tower]} alike (CKA {least:.4f} at least): one teacher twice?"
