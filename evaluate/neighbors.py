"""Exact nearest rows, in blocks: memory does not grow with the number of rows."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mmkd.base.arrays import Floats, Ints, Singles

BLOCK = 16_384
"""Rows whose features are held at a time."""
QUERIES = 256
"""Queries that are multiplied with a block at a time: 16 MiB of scores."""

Read = Callable[[Ints], Singles]
"""Positions (m,) to unit features, float32 (m, D)."""
Blocks = Iterable[tuple[Ints, Singles]]
"""Numbers of rows, int64 (m,), and their vectors, float32 (m, D), a block at a time; numbers ascend over all blocks."""


def blocks_of(read: Read, n: int) -> Blocks:
    """Yield rows 0 to n - 1."""
    for start in range(0, n, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, n))
        yield numbers, read(numbers)


def nearest_rows(
    queries: Singles, blocks: Blocks, k: int, excluded: Ints | None = None, group: Ints | None = None
) -> tuple[Ints, Singles]:
    """Find the k rows with the highest inner product for every query, float32 (q, D), best first, the first of equal
    ones. `excluded`: int64 (q,), the group whose rows may not answer a query. `group`: int64, of every number. Returns
    numbers, int64 (q, k), and products, float32 (q, k); -1 and -inf where there are fewer."""
    where = np.full((len(queries), k), -1, dtype=np.int64)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for numbers, values in blocks:
        for first in range(0, len(queries) if len(numbers) else 0, QUERIES):
            part = slice(first, first + QUERIES)
            scores = queries[part] @ values.T
            if excluded is not None and group is not None:
                own = np.flatnonzero(np.isin(group[numbers], excluded[part]))
                i, j = np.nonzero(excluded[part, None] == group[numbers[own]])
                scores[i, own[j]] = -np.inf
            _merge(best[part], where[part], scores, numbers)
    return where, best


def _merge(best: Singles, where: Ints, scores: Singles, numbers: Ints) -> None:
    """Put the scores of the next rows, (q, m), among the best k so far, in place. What is kept has lower numbers, so a
    stable sort leaves the first of equal rows in front."""
    k = best.shape[1]
    for i in np.flatnonzero(scores.max(axis=1) > best[:, -1]):
        better = np.flatnonzero(scores[i] > best[i, -1])
        if len(better) > 2 * k:
            better = better[scores[i, better] >= np.partition(scores[i, better], -k)[-k]]
        every, of = np.append(best[i], scores[i, better]), np.append(where[i], numbers[better])
        kept = np.argsort(-every, kind="stable")[:k]
        where[i], best[i] = of[kept], every[kept]


def shares_of_votes(labels: Ints, where: Ints, ks: Sequence[int], classes: int) -> Floats:
    """Share of each class among the first k neighbors, for every k, float64 (len(ks), q, C). `labels`: int64 (n,)."""
    found = labels[where]
    columns = np.array(ks) - 1
    votes = [np.cumsum(found == label, axis=1, dtype=np.int32)[:, columns] for label in range(classes)]
    return np.stack(votes, axis=-1).transpose(1, 0, 2) / np.array(ks, dtype=np.float64)[:, None, None]
