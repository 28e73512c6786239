"""Compute a selection from a rule: scores in one pass over the memory map, then verdicts, then counts by teacher, by
label, overlaps, rows left with none, and examples near each threshold."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkd.base.config import Frozen
from mmkd.base.errors import IncompleteStoreError, UserError
from mmkd.base.process import usable_cores
from mmkd.store.layout import PAIR_SOUND
from mmkd.store.reader import FeatureStore
from mmkd.store.record import Store
from mmkd.store.selection.rule import PairScore, SelectionRule
from mmkd.store.selection.scores import (
    BLOCK_ROWS,
    SCORERS,
    Block,
    Bools,
    Columns,
    Floats,
    check_teachers,
    column_codes,
    row_spans,
)
from mmkd.store.selection.verdict import Judge, Line, scores_of
from mmkd.store.selections import SelectionCard, check_name, digest_of, write_selection

Progress = Callable[[int, int], None]
"""Called with blocks done and the total number of blocks."""

EXAMPLES = 3
NOT_STATED = "(not stated)"
CAPTION_CHARACTERS = 200


class Share(Frozen):
    """Available pairs, and how many of them were kept."""

    available: int
    kept: int


class SelectionCounts(Frozen):
    """Counts in a selection's attributes, printed by `mmkd select`."""

    pairs: Share
    teachers: dict[str, Share]
    by: str
    groups: dict[str, Share]
    """By value of the sample column `by`."""
    overlaps: dict[str, dict[str, int]]
    """Rows kept for both of two teachers; on the diagonal, a teacher's pairs."""
    rows_without: int
    """Rows that have pairs of which none was kept."""
    rows_by_teachers: tuple[int, ...]
    """Rows for which 0, 1, ..., T teachers were kept, of rows with a pair."""


class Example(Frozen):
    """A pair near a threshold."""

    kept: bool
    """By this threshold alone; other parts of the rule may decide otherwise."""
    teacher: str
    row: int
    key: str
    caption: str
    score: float | None
    """None when infinite, as the rank of a label without prompts."""


@dataclass(frozen=True)
class SelectionReport:
    """Result of `mmkd select`; the selection's attributes hold all of it but the warnings."""

    name: str
    counts: SelectionCounts
    thresholds: dict[str, dict[str, float | None]]
    examples: dict[str, list[Example]]
    digest: str
    warnings: tuple[str, ...]


def select(
    store: FeatureStore, name: str, rule: SelectionRule, by: str = "modality", progress: Progress | None = None
) -> SelectionReport:
    """Judge every pair by a rule and write `selections/<name>`; four bytes of memory per pair and score. Raises
    UserError if the name is taken, the rule keeps nothing, or a teacher, column, label or prompt is missing;
    IncompleteStoreError if a teacher is missing in some shards; TeacherMismatchError for prompts of other weights."""
    root = check_name(store.root, name)
    columns = pairs_to_judge(store, rule)
    count(columns, columns.available, by)  # a missing column is reported before the long part
    kept, lines = judge(columns, rule, progress)
    counts = count(columns, kept, by)
    if not counts.pairs.kept:
        alone = "; ".join(f"{line.rule} alone keeps {int(line.passed().sum()):,}" for line in lines)
        raise UserError(
            f"the rule keeps none of {int(columns.available.sum()):,} pairs, so nothing was written"
            f"{': ' + alone if alone else ''}; loosen it"
        )
    # None where no score divides the pairs: JSON has no infinity.
    limits = {line.rule: [x if math.isfinite(x) else None for x in line.threshold.tolist()] for line in lines}
    thresholds = {name: dict(zip(columns.slugs, values, strict=True)) for name, values in limits.items()}
    near = {line.rule: examples(store, columns.slugs, line, EXAMPLES) for line in lines}
    card = SelectionCard(
        rule=rule.model_dump(mode="json", by_alias=True, exclude_none=True),
        teachers={slug: store.card(slug).digest for slug in columns.slugs},
        rows=len(store),
        counts=counts.model_dump(mode="json"),
        thresholds=thresholds,
        examples={name: [one.model_dump(mode="json") for one in found] for name, found in near.items()},
        digest=digest_of(kept),
    )
    write_selection(Store(root, store.record), name, kept, card)
    useless = "the rule keeps every available pair: training with it is training without a selection"
    warnings = (useless,) if counts.pairs.kept == counts.pairs.available else ()
    return SelectionReport(name, counts, thresholds, near, card.digest, warnings)


def pairs_to_judge(store: FeatureStore, rule: SelectionRule) -> Columns:
    """Return the teachers a rule judges, and where they have both features. Raises UserError for an unknown teacher;
    IncompleteStoreError if one is missing in some shards."""
    slugs = check_teachers(store, rule.teachers)
    for slug in slugs:
        asked = store.record.asked_shards(store.card(slug))
        if missing := [shard for shard in asked if (shard, slug) not in store.ledger]:
            named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise IncompleteStoreError(
                f"teacher {slug} is missing in {len(missing)} of {len(asked)} shards ({named}); finish "
                "`mmkd extract`, or leave it out with `teachers:` in the rule"
            )
    available = np.stack([store.valid(slug) & PAIR_SOUND == PAIR_SOUND for slug in slugs], axis=1)
    return Columns(store, slugs, available)


def judge(columns: Columns, rule: SelectionRule, progress: Progress | None = None) -> tuple[Bools, list[Line]]:
    """Return the pairs a rule keeps, bool (N, T), and its thresholds."""
    specs = list(dict.fromkeys(scores_of(rule.keep)))
    decide = Judge(columns, compute_scores(columns, specs, rule.seed, progress))
    return decide.apply(rule.keep), decide.lines


def compute_scores(
    columns: Columns, specs: list[PairScore], seed: int, progress: Progress | None = None, threads: int | None = None
) -> dict[PairScore, Floats]:
    """Compute each score of every pair, float32 (N, T), NaN where a teacher has no pair; features are read once."""
    scorers = {spec: SCORERS[type(spec)](spec, columns, seed) for spec in specs}
    rows = len(columns.store)
    out = {spec: np.full(columns.available.shape, np.nan, dtype=np.float32) for spec in specs}
    starts = range(0, rows if specs else 0, BLOCK_ROWS)

    def work(start: int) -> None:
        block = Block(columns, slice(start, min(start + BLOCK_ROWS, rows)))
        for spec, scorer in scorers.items():
            out[spec][block.rows] = np.where(block.sound, scorer(block), np.nan)

    # Threads, not processes: NumPy releases the interpreter lock in products, sorts and casts, and the map is shared.
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        for done, _ in enumerate(pool.map(work, starts), start=1):
            if progress:
                progress(done, len(starts))
    return out


def count(columns: Columns, kept: Bools, by: str) -> SelectionCounts:
    """Count the pairs in `kept`, bool (N, T). Raises UserError if `by` is not a sample column."""
    available, slugs = columns.available, columns.slugs
    values, group = column_codes(columns.store, by)
    names = [*map(str, values), NOT_STATED]
    totals, both = np.zeros((2, len(names)), dtype=np.int64), np.zeros((len(slugs),) * 2, dtype=np.int64)
    histogram = np.zeros(len(slugs) + 1, dtype=np.int64)
    for rows in row_spans(len(kept)):
        for number, pairs in enumerate((available[rows], kept[rows])):
            weights = pairs.sum(axis=1)
            totals[number] += np.bincount(group[rows], weights=weights, minlength=len(names)).astype(np.int64)
        as_counts = kept[rows].astype(np.float64)  # exact, and a matrix product of floats is fast
        both += (as_counts.T @ as_counts).astype(np.int64)
        histogram += np.bincount(kept[rows][available[rows].any(axis=1)].sum(axis=1), minlength=len(slugs) + 1)
    return SelectionCounts(
        pairs=Share(available=int(available.sum()), kept=int(kept.sum())),
        teachers={
            slug: Share(available=int(there), kept=int(stay))
            for slug, there, stay in zip(slugs, available.sum(axis=0), kept.sum(axis=0), strict=True)
        },
        by=by,
        groups={
            name: Share(available=there, kept=stay)
            for name, there, stay in sorted(
                zip(names, *totals.tolist(), strict=True), key=lambda entry: (-entry[1], entry[0])
            )
            if there
        },
        overlaps={a: dict(zip(slugs, row.tolist(), strict=True)) for a, row in zip(slugs, both, strict=True)},
        rows_without=int(histogram[0]),
        rows_by_teachers=tuple(histogram.tolist()),
    )


def examples(store: FeatureStore, slugs: tuple[str, ...], line: Line, each: int) -> list[Example]:
    """Return the pairs nearest to a threshold, best first: `each` on either side."""
    sides: tuple[list[tuple[Floats, NDArray[np.int64]]], ...] = ([], [])
    for span in row_spans(len(line.score)):
        with np.errstate(invalid="ignore"):  # a rank may be infinite
            distance = (line.score[span] - line.threshold) * (1.0 if line.higher else -1.0)
        flat: Floats = distance.reshape(-1).astype(np.float32)
        for side, here in zip(sides, (flat >= 0, flat < 0), strict=True):
            places = np.flatnonzero(here)
            nearest = places[_smallest(np.abs(flat[places]), each)]
            side.append((np.abs(flat[nearest]), nearest + span.start * len(slugs)))
    merged = [[np.concatenate(parts) for parts in zip(*side, strict=True)] for side in sides]
    passed, below = (places[_smallest(away, each)] for away, places in merged)
    above = passed[::-1]
    rows, teachers = np.divmod(np.concatenate([above, below]), len(slugs))
    table = store.samples.take(rows, columns=["key", "caption"]).to_pylist() if len(rows) else []
    return [
        Example(
            kept=i < len(above),
            teacher=slugs[t],
            row=int(row),
            key=text["key"],
            caption=(text["caption"] or "")[:CAPTION_CHARACTERS],
            score=score if math.isfinite(score := float(line.score[row, t])) else None,
        )
        for i, (row, t, text) in enumerate(zip(rows, teachers, table, strict=True))
    ]


def _smallest(values: Floats, count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` smallest values in order; ties keep the first."""
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    limit = np.partition(values, min(count, len(values)) - 1)[: min(count, len(values))].max()
    candidates = np.flatnonzero(values <= limit)
    return candidates[np.argsort(values[candidates], kind="stable")[:count]]
