"""Counts of a selection: by teacher, by label, overlaps, rows left with none, and examples near each threshold."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmkd.base.config import Frozen
from mmkd.store.reader import FeatureStore
from mmkd.store.selection.block import Bools, Columns, Floats
from mmkd.store.selection.verdict import Line

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
    """Sample column of `groups`."""
    groups: dict[str, Share]
    """Value of the column to its pairs."""
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
    """Its first `CAPTION_CHARACTERS`."""
    score: float | None
    """None when infinite, as the rank of a label without prompts."""


def count(columns: Columns, kept: Bools, by: str) -> SelectionCounts:
    """Count the pairs in `kept`, bool (N, T). Raises UserError if `by` is not a sample column."""
    available, slugs = columns.available, columns.slugs
    encoded = columns.store.sample_table([by])[by].combine_chunks().dictionary_encode()
    names = [*map(str, encoded.dictionary.to_pylist()), NOT_STATED]
    group = encoded.indices.fill_null(len(names) - 1).to_numpy()
    totals = [
        np.bincount(group, weights=pairs.sum(axis=1), minlength=len(names)).astype(int).tolist()
        for pairs in (available, kept)
    ]
    as_counts = kept.astype(np.float64)  # exact below 2**53, and a matrix product of floats is fast
    both = (as_counts.T @ as_counts).astype(int)
    live = available.any(axis=1)
    histogram = np.bincount(kept[live].sum(axis=1), minlength=len(slugs) + 1)
    return SelectionCounts(
        pairs=Share(available=int(available.sum()), kept=int(kept.sum())),
        teachers={
            slug: Share(available=int(there), kept=int(stay))
            for slug, there, stay in zip(slugs, available.sum(axis=0), kept.sum(axis=0), strict=True)
        },
        by=by,
        groups={
            name: Share(available=there, kept=stay)
            for name, there, stay in sorted(zip(names, *totals, strict=True), key=lambda entry: (-entry[1], entry[0]))
            if there
        },
        overlaps={a: dict(zip(slugs, row.tolist(), strict=True)) for a, row in zip(slugs, both, strict=True)},
        rows_without=int(histogram[0]),
        rows_by_teachers=tuple(histogram.tolist()),
    )


def examples(store: FeatureStore, slugs: tuple[str, ...], line: Line, each: int) -> list[Example]:
    """Return the pairs nearest to a threshold, best first: `each` on either side."""
    with np.errstate(invalid="ignore"):  # a rank may be infinite
        distance = (line.score - line.threshold) * (1.0 if line.higher else -1.0)
    flat: Floats = distance.reshape(-1).astype(np.float32)
    passed = np.flatnonzero(flat >= 0)
    failed = np.flatnonzero(flat < 0)
    above = passed[_smallest(flat[passed], each)][::-1]
    below = failed[_smallest(-flat[failed], each)]
    places = np.concatenate([above, below])
    rows, teachers = np.divmod(places, len(slugs))
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
