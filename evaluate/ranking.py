"""Ranks of positives among a gallery, by counting instead of sorting. A positive's rank (from 0) is the number of
negatives that score at least as high: a tie counts against the model, so a model that gives one score to all finds
nothing. Sorting would let the order of rows decide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.metrics import Floats

TIE = 1e-6
"""Cosines closer than this are equal. The product of two float32 vectors depends on where they stand in a matrix:
equal gallery rows had different cosines in 19 of 80 products measured (128 to 1152 wide), by up to 3e-8, and rounding
errors reach 1.2e-7. Exact comparison would break true ties (duplicate images or captions) at random."""
CHUNK_ELEMENTS = 1 << 24
"""Scores held at a time: 64 MiB of float32."""


@dataclass(frozen=True)
class QueryRanks:
    """Input of retrieval metrics for n queries. best: float64 (n,), rank from 0 of the best positive; NaN for a query
    without positives. ties: float64 (n,), negatives that score like the best positive. found: float64 (n, len(ks)),
    share of a query's positives among the first k."""

    best: Floats
    ties: Floats
    found: Floats


def rank_positives(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], positives: list[NDArray[np.int64]], ks: tuple[int, ...]
) -> QueryRanks:
    """Rank the positives of every query by inner product.

    Args:
        queries: float32 (n, D).
        gallery: float32 (m, D).
        positives: for every query the gallery indices that are right.
        ks: cut-offs of `found`.
    """
    n = len(queries)
    ranks = QueryRanks(np.full(n, np.nan), np.full(n, np.nan), np.full((n, len(ks)), np.nan))
    step = max(1, CHUNK_ELEMENTS // max(1, len(gallery)))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        rank_scores(queries[part] @ gallery.T, positives[part], ks, _view(ranks, part))
    return ranks


def rank_scores(
    scores: NDArray[np.floating], positives: list[NDArray[np.int64]], ks: tuple[int, ...], into: QueryRanks
) -> None:
    """Rank the positives of every query in a score matrix (n, m), written into `into`."""
    for i, right in enumerate(positives):
        if len(right) == 0:
            continue
        row = scores[i]
        wrong = np.ones(len(row), dtype=bool)
        wrong[right] = False
        negatives = row[wrong]
        own = np.sort(row[right])[::-1]
        ahead = np.array([np.count_nonzero(negatives >= score - TIE) for score in own])
        into.best[i] = ahead[0]
        into.ties[i] = np.count_nonzero(np.abs(negatives - own[0]) <= TIE)
        # The j-th best positive stands behind j positives and all negatives that are not below it.
        places = ahead + np.arange(len(own))
        into.found[i] = [np.count_nonzero(places < k) / len(own) for k in ks]


def recall_at(rank: Floats, k: int, weights: Floats) -> Floats:
    """R@k as CLIP papers use the word: the share of queries with a positive among the first k. `rank`: float64 (n,),
    from 0. `k`: cut-off. `weights`: float64 (B, n), see `mmkd.evaluate.metrics`."""
    return weighted_mean((rank < k).astype(np.float64), weights)


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Return the mean of `values` (n,) in each of B resamples, float64 (B,); NaN for an empty one."""
    totals = weights.sum(axis=1)
    result = np.full(len(weights), np.nan)
    np.divide(weights @ values, totals, out=result, where=totals > 0)
    return result


def weighted_median(values: Floats, weights: Floats) -> Floats:
    """Return the median of `values` (n,) in each of B resamples: the mean of the two middle ones where they differ."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    cumulative = np.cumsum(weights[:, order], axis=1)
    result = np.full(len(weights), np.nan)
    for b, counts in enumerate(cumulative):
        if len(counts) and counts[-1] > 0:
            half = counts[-1] / 2
            low, high = np.searchsorted(counts, half, side="left"), np.searchsorted(counts, half, side="right")
            result[b] = (ranked[low] + ranked[min(high, len(ranked) - 1)]) / 2
    return result


def _view(ranks: QueryRanks, part: slice) -> QueryRanks:
    return QueryRanks(ranks.best[part], ranks.ties[part], ranks.found[part])
