"""Exact nearest rows of other groups by cosine, in blocks: memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 16_384
"""Rows whose features are held at a time."""
QUERIES = 256
"""Queries that are multiplied with a block at a time: 16 MiB of scores."""

Read = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Positions (m,) to unit features, float32 (m, D)."""


def nearest_rows(
    read: Read, group: NDArray[np.int64], queries: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the k rows of other groups with the highest cosine to every query, best first, the first of equal ones.
    `group`: int64 (n,), of every row. `queries`: positions, int64 (q,). Returns positions, int64 (q, k), and cosines,
    float32 (q, k); -1 and -inf where other groups have fewer rows."""
    asked = read(queries)
    where = np.full((len(queries), k), -1, dtype=np.int64)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for start in range(0, len(group), BLOCK):
        numbers = np.arange(start, min(start + BLOCK, len(group)))
        values = read(numbers)
        for first in range(0, len(queries), QUERIES):
            part = slice(first, first + QUERIES)
            scores = asked[part] @ values.T
            scores[group[queries[part], None] == group[numbers]] = -np.inf
            _merge(best[part], where[part], scores, start)
    return where, best


def _merge(best: NDArray[np.float32], where: NDArray[np.int64], scores: NDArray[np.float32], start: int) -> None:
    """Put the scores of the next rows, (q, m), among the best k so far, in place. What is kept has lower positions, so
    a stable sort leaves the first of equal rows in front."""
    k = best.shape[1]
    every = np.concatenate([best, scores], axis=1)
    limits = np.partition(every, -k, axis=1)[:, -k]
    for i, (row, limit) in enumerate(zip(every, limits, strict=True)):
        kept = np.flatnonzero((row >= limit) & (row > -np.inf))
        kept = kept[np.argsort(-row[kept], kind="stable")[:k]]
        positions = np.where(kept < k, where[i, np.minimum(kept, k - 1)], kept - k + start)
        best[i], where[i] = -np.inf, -1
        best[i, : len(kept)], where[i, : len(kept)] = row[kept], positions


def shares_of_votes(
    labels: NDArray[np.int64], where: NDArray[np.int64], ks: Sequence[int], classes: int
) -> NDArray[np.float64]:
    """Share of each class among the first k neighbors, for every k, float64 (len(ks), q, C). `labels`: int64 (n,)."""
    found = labels[where]
    columns = np.array(ks) - 1
    votes = [np.cumsum(found == label, axis=1, dtype=np.int32)[:, columns] for label in range(classes)]
    return np.stack(votes, axis=-1).transpose(1, 0, 2) / np.array(ks, dtype=np.float64)[:, None, None]
