"""Scores with intervals from stored predictions, and paired differences of two models with p-values."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mmkd.base.arrays import Bools, Floats
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import BootstrapSettings, Contrast, Scoring

FEWEST_GROUPS = 10
"""An interval, and with it a p and a verdict, needs this many independent groups. In simulations, intervals of 10
groups that claim 95 % hold the truth in 88 to 89 % of studies; fewer groups say nothing about others."""
TOLERANCE = 1e-9
"""Values of a metric closer than this are equal: the order of a sum changes the 16th digit of a float, one sample more
that is right changes a score of 10,000 by the 4th."""

Verdict = Literal["win", "tie", "loss"]
VERDICTS: tuple[Verdict, ...] = ("win", "tie", "loss")


@dataclass(frozen=True)
class Replicates:
    """A value, NaN where undefined for a `reason`, and what it became in each resample: draws, float64 (B,). n, groups:
    rows and groups behind it. missing: rows without features. limits: least and largest possible value. trials: groups
    of a mean over samples, 0 for other metrics. contrast: `rarer_groups`, None where the metric compares nothing."""

    value: float
    draws: Floats
    n: int
    groups: int
    missing: int
    limits: tuple[float, float] = (-math.inf, math.inf)
    trials: int = 0
    reason: str = ""
    contrast: int | None = None

    @property
    def informative(self) -> int:
        return self.groups if self.contrast is None else min(self.groups, self.contrast)

    def interval(self, level: float) -> tuple[float, float]:
        """Return the percentile interval at `level` (Efron and Tibshirani 1993, section 13.3); NaN where the value or
        half of the resamples are undefined, or below `FEWEST_GROUPS`, be it of the rarer class (with two positives
        among a hundred negatives, 95 % hold the truth in 55 to 65 % of simulated studies).

        Resamples that are all equal cannot show errors that did not occur. Between limits, means over samples then have
        an interval: of n groups, up to z^2 / (n + z^2) may be unlike these and as far from the value as the limits
        allow. At 0 and 100 % this is Wilson's (1927), for a paired difference of zero Newcombe's (1998, Statistics in
        Medicine 17:2635, method 10)."""
        finite = self.draws[np.isfinite(self.draws)]
        enough = self.informative >= FEWEST_GROUPS and len(finite) >= 0.5 * max(1, len(self.draws))
        if math.isnan(self.value) or not enough:
            return math.nan, math.nan
        tail = (1 - level) / 2
        low, high = (float(limit) for limit in np.percentile(finite, [100 * tail, 100 * (1 - tail)]))
        least, most = self.limits
        if high - low > TOLERANCE or math.isinf(most):
            return low, high
        if not self.trials:
            return math.nan, math.nan
        unlike = float(stats.norm.ppf(tail) ** 2 / (self.trials + stats.norm.ppf(tail) ** 2))
        return self.value - unlike * (self.value - least), self.value + unlike * (most - self.value)


def resampled(
    predictions: Predictions,
    metrics: Collection[str],
    scoring: Scoring,
    *,
    bootstrap: BootstrapSettings,
    name: str,
    parts: Mapping[str, Bools],
) -> dict[tuple[str, str], Replicates]:
    """Score the available rows of each part, bool (n,), by several metrics of `scoring`, by (part, metric). Resamples,
    seeded by `name` too, are drawn over all n rows and then cut to those that count: models, metrics and parts share
    them."""
    masks = {part: predictions.available & mask for part, mask in parts.items()}
    taken = {part: predictions.take(mask) for part, mask in masks.items()}
    draws: dict[tuple[str, str], list[Floats]] = {(part, metric): [] for part in parts for metric in metrics}
    for block in scoring.resamples(predictions, bootstrap, name):
        for part, mask in masks.items():
            weights = block.T[mask].T
            for metric in metrics:
                draws[part, metric].append(scoring.metrics[metric](taken[part], weights))
    found = {}
    for (part, metric), blocks in draws.items():
        rows, one = taken[part], scoring.metrics[metric]
        value = float(one(rows, np.ones((1, len(rows))))[0])
        used = one.rows(rows) if one.rows is not None else np.ones(len(rows), dtype=bool)
        groups, drawn = len(set(rows.group[used].tolist())), np.concatenate(blocks)
        undefined = rows.info.get("undefined", {}).get(metric, one.undefined)
        if one.centered and np.isfinite(drawn).any():
            drawn = np.maximum(drawn - np.nanmean(drawn) + value, min(value, 0.0))
        found[part, metric] = Replicates(
            value=value,
            draws=drawn,
            n=int(used.sum()),
            groups=groups,
            missing=int((parts[part] & ~predictions.available).sum()),
            limits=(0.0, 1.0) if one.share else (-math.inf, math.inf),
            trials=groups if one.mean else 0,
            reason=undefined if math.isnan(value) else "",
            contrast=None if one.mean else rarer_groups(rows.group, (one.contrasts or scoring.contrasts)(rows)),
        )
    return found


def rarer_groups(group: NDArray[Any], contrasts: Sequence[Contrast]) -> int | None:
    """Return groups of the rarer side of a contrast, None without one; of several, as many as give their mean the
    variance of a single one. An area under the ROC curve has a variance of about 1/m for m groups of the rarer side,
    the mean of C areas the sum of 1/m over the square of C."""
    sides = [min(len(set(group[side].tolist())) for side in one) for one in contrasts]
    return int(len(there) ** 2 / sum(1 / m for m in there)) if (there := [m for m in sides if m]) else None


def averaged(parts: Sequence[Replicates], *, same_rows: bool = False) -> Replicates:
    """Return the unweighted mean of one metric, resample by resample; groups are those of the smallest part. Parts of
    one data set share resamples, of different ones not. With `same_rows` (draws of the labels) rows count once."""
    counted = parts[:1] if same_rows else parts
    return replace(
        parts[0],
        value=float(np.mean([part.value for part in parts])),
        draws=np.mean([part.draws for part in parts], axis=0),
        n=sum(part.n for part in counted),
        groups=min(part.groups for part in parts),
        missing=sum(part.missing for part in counted),
        trials=min(part.trials for part in parts),
        contrast=min((part.contrast for part in parts if part.contrast is not None), default=None),
        reason=next((part.reason for part in parts if part.reason), ""),
    )


def interval_text(value: float, low: float, high: float, form: str, scale: int = 1) -> str:
    """`value [low, high]`, times `scale` in the format `form`; `-` without a value, bare without an interval."""
    if math.isnan(value):
        return "-"
    limits = "" if math.isnan(low) else f" [{low * scale:{form}}, {high * scale:{form}}]"
    return f"{value * scale:{form}}{limits}"


def p_text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


@dataclass(frozen=True)
class Difference:
    """A paired difference, first model minus second, in units of the metric. p: two-sided, from the same resamples as
    the interval; NaN where there is no interval. n: samples that both models answered."""

    value: float
    low: float
    high: float
    p: float
    n: int

    def text(self, percent: bool) -> str:
        """The difference with its sign and its interval."""
        form, scale = ("+.1f", 100) if percent else ("+.2f", 1)
        return interval_text(self.value, self.low, self.high, form, scale)

    def verdict(self, lower_is_better: bool = False) -> Verdict | None:
        """`tie` when the interval holds zero; None where there is no interval."""
        if math.isnan(self.low):
            return None
        if self.low <= 0 <= self.high:
            return "tie"
        return "win" if (self.value > 0) != lower_is_better else "loss"


def paired_difference(one: Replicates, other: Replicates, level: float) -> Difference:
    """Return the difference of two models on the same samples and resamples. p = 2 min(P(d <= 0), P(d >= 0)) over the
    resampled differences d, one added to counts and resamples (Davison and Hinkley 1997, equation 4.11), at most 1 and
    at least the 2^(1-groups) that changing signs of groups can reach. Differences up to `TOLERANCE` are zero."""
    assert one.draws.shape == other.draws.shape, "paired models share their resamples"
    differences = np.append(one.draws - other.draws, one.value - other.value)
    differences[np.abs(differences) <= TOLERANCE] = 0.0
    value, (least, most), n = float(differences[-1]), one.limits, min(one.n, other.n)
    delta = replace(averaged([one, other]), value=value, draws=differences[:-1], limits=(least - most, most - least))
    low, high = delta.interval(level)
    if math.isnan(low):
        return Difference(value, low, high, math.nan, n)
    finite = delta.draws[np.isfinite(delta.draws)]
    tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    p = float(min(1.0, 2 * (tail + 1) / (len(finite) + 1)))
    return Difference(value, low, high, max(p, 2.0 ** (1 - delta.informative)), n)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Return two-sided p of Wilcoxon's signed-rank test (1945); zeros are dropped, ties have their mean rank.
    Differences below `TOLERANCE` are zero, sizes closer than that tied (24/40 - 23/40, 2/40 - 1/40). 1 where all are
    zero, NaN without any. Up to 50 differences p is exact, with ties too; SciPy's only below 14."""
    found = np.array([one for one in differences if not math.isnan(one)])
    if len(found) == 0:
        return math.nan
    found = found[np.abs(found) > TOLERANCE]
    if len(found) == 0:
        return 1.0
    size = dense_ranks(np.abs(found))
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


def dense_ranks(values: Floats) -> Floats:
    """Return ranks from 1, float64 (n,), of values (n,); those that differ by no more than `TOLERANCE` share theirs."""
    order = np.argsort(values)
    ranks = np.empty(len(values))
    ranks[order] = 1 + np.cumsum(np.diff(values[order], prepend=values[order[:1]]) > TOLERANCE)
    return ranks


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of p-values for several rivals; NaN stays NaN and counts for nothing."""
    adjusted = np.array(p, dtype=np.float64)
    there = np.flatnonzero(~np.isnan(adjusted))
    order = there[np.argsort(adjusted[there], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(adjusted[order] * factors))
    return [float(one) for one in adjusted]
