"""Teachers' verdicts on rows as names for coloring a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmkd.store.inspect.outliers import MIN_ROWS, standard_scores

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

NAMED = 2
"""Teachers that are named where so few lack a row."""


def teacher_colours(
    store: FeatureStore, slugs: Sequence[str], rows: NDArray[np.int64], cosines: NDArray[np.float32]
) -> dict[str, dict[int, str]]:
    """Return colorings by teacher: presence of a row, and the teacher whose caption fits best. Result: row to value, by
    name. `best teacher` is the one whose cosine stands out most from its own others (standard scores by median and
    median deviation: teachers' cosines differ in level); it needs two teachers and 20 rows.

    Args:
        store: the store.
        slugs: teachers.
        rows: int64 (n,).
        cosines: float32 (teachers, n) of each image with its caption; NaN where a teacher lacks one of both.
    """
    has = np.array([store.valid(slug)[rows] != 0 for slug in slugs]).reshape(len(slugs), len(rows))
    found = {"teachers": {int(row): _who(slugs, has[:, i]) for i, row in enumerate(rows)}}
    compared = [i for i in range(len(slugs)) if np.isfinite(cosines[i]).sum() >= MIN_ROWS]
    if len(compared) > 1:
        scores = np.full(cosines.shape, -np.inf)
        for i in compared:
            there = np.isfinite(cosines[i])
            scores[i, there] = standard_scores(cosines[i, there].astype(np.float64))
        best = scores.argmax(axis=0)
        found["best teacher"] = {
            int(row): slugs[best[i]] if np.isfinite(scores[:, i]).any() else "none" for i, row in enumerate(rows)
        }
    return found


def _who(slugs: Sequence[str], has: NDArray[np.bool_]) -> str:
    lacking = [slug for slug, there in zip(slugs, has, strict=True) if not there]
    if not lacking:
        return "all"
    if len(lacking) == len(slugs):
        return "none"
    return f"all but {', '.join(lacking)}" if len(lacking) <= NAMED else f"{len(slugs) - len(lacking)} of {len(slugs)}"
