"""Is one model better than another: paired differences, tests across data sets, corrections for many rivals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mmkd.evaluate.scoring import TOLERANCE, Replicates

Verdict = Literal["win", "tie", "loss"]
VERDICTS: tuple[Verdict, ...] = ("win", "tie", "loss")


def p_text(value: float) -> str:
    """A p-value to three digits, `-` where there is none."""
    return "-" if math.isnan(value) else f"{value:.3g}"


@dataclass(frozen=True)
class Difference:
    """A paired difference, first model minus second, in units of the metric."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, from the same resamples as the interval; NaN where there is no interval."""
    n: int
    """Samples that both models answered."""

    def verdict(self, lower_is_better: bool = False) -> Verdict | None:
        """`tie` when the interval holds zero; None where there is no interval."""
        if math.isnan(self.low):
            return None
        if self.low <= 0 <= self.high:
            return "tie"
        return "win" if (self.value > 0) != lower_is_better else "loss"


def paired_difference(one: Replicates, other: Replicates, level: float) -> Difference:
    """Difference of two models scored on the same samples and the same resamples.

    p = 2 min(P(d <= 0), P(d >= 0)) over the resampled differences d, with one added to counts and resamples so
    that it is never zero (Davison and Hinkley 1997, equation 4.11), at most 1 and never below the 2^(1-groups) that
    changing signs of groups can reach. Differences up to `TOLERANCE` are zero.
    """
    assert one.draws.shape == other.draws.shape, "paired models share their resamples"
    delta = replace(
        one,
        value=float(_without_noise(np.array(one.value - other.value))),
        draws=_without_noise(one.draws - other.draws),
        n=min(one.n, other.n),
        groups=min(one.groups, other.groups),
        limits=(one.limits[0] - other.limits[1], one.limits[1] - other.limits[0]),
        trials=min(one.trials, other.trials),
    )
    low, high = delta.interval(level)
    if math.isnan(low):
        return Difference(delta.value, low, high, math.nan, delta.n)
    finite = delta.draws[np.isfinite(delta.draws)]
    tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    p = min(1.0, 2 * (tail + 1) / (len(finite) + 1))
    return Difference(delta.value, low, high, max(p, 2.0 ** (1 - delta.groups)), delta.n)


def _without_noise(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(differences) <= TOLERANCE, 0.0, differences)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test (1945) over data sets; zeros are dropped, ties have their mean rank.

    Differences below `TOLERANCE` are zero, and sizes closer than that are tied: 24/40 - 23/40 and 2/40 - 1/40 are one
    sample each, whatever their floats. 1 where all differences are zero, NaN without any. Five data sets cannot go
    below 0.0625. Up to 50 differences p is exact, with ties too; SciPy is exact there only below 14, by 2^n passes
    through its statistic.
    """
    found = np.array([one for one in differences if not math.isnan(one)])
    if len(found) == 0:
        return math.nan
    found = found[np.abs(found) > TOLERANCE]
    if len(found) == 0:
        return 1.0
    order = np.argsort(np.abs(found))
    size = np.empty(len(found))
    size[order] = 1 + np.cumsum(np.diff(np.abs(found)[order], prepend=0.0) > TOLERANCE)
    if len(found) > 50:
        return float(stats.wilcoxon(np.copysign(size, found)).pvalue)
    # The sum of positive ranks among all 2^n ways to put the signs, counted by sum: one addition per rank and sum.
    doubled = np.rint(2 * stats.rankdata(size)).astype(np.int64)  # mean ranks are halves
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
