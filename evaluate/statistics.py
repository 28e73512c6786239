"""Is one model better than another: paired differences, tests across data sets, corrections for many rivals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mmkd.evaluate.scoring import Replicates

Verdict = Literal["win", "tie", "loss"]


@dataclass(frozen=True)
class Difference:
    """A paired difference, first model minus second, in units of the metric."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, from the same resamples as the interval."""
    n: int
    """Samples that both models answered."""

    def verdict(self, lower_is_better: bool = False) -> Verdict:
        """`tie` when the interval holds zero, or there is none."""
        if math.isnan(self.low) or self.low <= 0 <= self.high:
            return "tie"
        return "win" if (self.value > 0) != lower_is_better else "loss"


def paired_difference(one: Replicates, other: Replicates, level: float) -> Difference:
    """Difference of two models scored on the same samples and the same resamples.

    p = 2 min(P(d <= 0), P(d >= 0)) over the resampled differences d, with one added to counts and resamples so
    that it is never zero (Davison and Hinkley 1997, equation 4.11), at most 1.
    """
    assert one.draws.shape == other.draws.shape, "paired models share their resamples"
    draws = one.draws - other.draws
    delta = Replicates(one.value - other.value, draws, min(one.n, other.n), one.groups, one.missing)
    low, high = delta.interval(level)
    if math.isnan(low):
        return Difference(delta.value, low, high, math.nan, delta.n)
    finite = draws[np.isfinite(draws)]
    tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    return Difference(delta.value, low, high, min(1.0, 2 * (tail + 1) / (len(finite) + 1)), delta.n)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test (1945) over data sets; zeros are dropped, ties have their mean rank.

    1 where all differences are zero, NaN without any. Five data sets cannot go below 0.0625. Up to 50 differences p is
    exact, with ties too; SciPy is exact there only below 14, by 2^n passes through its statistic.
    """
    found = np.array([one for one in differences if not math.isnan(one)])
    if len(found) == 0:
        return math.nan
    found = found[found != 0]
    if len(found) == 0:
        return 1.0
    return _exact_signed_rank_p(found) if len(found) <= 50 else float(stats.wilcoxon(found).pvalue)


def _exact_signed_rank_p(found: NDArray[np.float64]) -> float:
    """Of the sum of positive ranks among all 2^n ways to put the signs, counted by sum: one addition a rank and sum."""
    doubled = np.rint(2 * stats.rankdata(np.abs(found))).astype(np.int64)  # mean ranks are halves
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1
    for rank in doubled:
        ways[rank:] += ways[:-rank].copy()
    positive = int(doubled[found > 0].sum())
    tail = min(ways[: positive + 1].sum(), ways[positive:].sum())
    return float(min(1.0, 2 * tail / 2.0 ** len(found)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of p-values for several rivals; NaN stays NaN and counts for nothing."""
    adjusted = np.array(p, dtype=np.float64)
    there = np.flatnonzero(~np.isnan(adjusted))
    order = there[np.argsort(adjusted[there], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(adjusted[order] * factors))
    return [float(one) for one in adjusted]


def mcnemar_p(one_right: NDArray[np.bool_], other_right: NDArray[np.bool_]) -> float:
    """Exact two-sided p of McNemar's test (1947): a check on the bootstrap for accuracies.

    Args:
        one_right: bool (n,), where the first model is right.
        other_right: bool (n,), the same samples.
    """
    only_one = int(np.count_nonzero(one_right & ~other_right))
    only_other = int(np.count_nonzero(~one_right & other_right))
    if only_one + only_other == 0:
        return 1.0
    return float(stats.binomtest(only_one, only_one + only_other, 0.5).pvalue)
