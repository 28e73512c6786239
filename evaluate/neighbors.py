"""The nearest row of one set of unit features to every row of another, exactly, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

QUERIES = 4096
"""Queries multiplied at a time; against a block of 8192 rows the scores take 128 MiB of float32."""
BLOCK = 8192
"""Rows that a caller should hand over at a time."""


def nearest(
    queries: NDArray[np.float32],
    blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    excluded: NDArray[np.int64] | None = None,
    group: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the row with the highest inner product for every query; the first of equal ones.

    Args:
        queries: float32 (n, D), finite.
        blocks: pairs of numbers, int64 (m,), ascending over all blocks, and values, float32 (m, D), finite.
        excluded: int64 (n,), for every query the group whose rows may not be its answer.
        group: int64, the group of every number; goes with `excluded`.

    Returns:
        Inner products, float32 (n,), and numbers, int64 (n,); -inf and -1 where nothing was there to be found.
    """
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    where = np.full(len(queries), -1, dtype=np.int64)
    for numbers, values in blocks:
        if len(numbers) == 0:
            continue
        for start in range(0, len(queries), QUERIES):
            part = slice(start, start + QUERIES)
            scores = queries[part] @ values.T
            if excluded is not None and group is not None:
                scores[excluded[part, None] == group[numbers]] = -np.inf
            column = scores.argmax(axis=1)
            found = scores[np.arange(len(column)), column]
            better = found > best[part]
            best[part][better] = found[better]
            where[part][better] = numbers[column[better]]
    return best, where
