"""Metrics that take counts: one call scores a block of bootstrap resamples. `y` is int64 (n,), classes 0 to C - 1;
`score` is float64 (n, C), higher is surer; of two classes, `positive` is bool (n,) and `score` float64 (n,); of
survival, `time` is float64 (n,) and `event` bool (n,), whether it was seen. `weights` is float64 (B, n): how often each
sample occurs in each of B resamples; a row of ones is the data set itself. Every metric is float64 (B,), NaN where it
has no value. Counts instead of repeated rows add no ties to the data."""

import numpy as np
from scipy.integrate import trapezoid

from mmkd.base.arrays import Bools, Floats, Ints

Labels = Ints
SUBJECTS = 512
"""Compared with all n others at a time by `concordance`: n x 512 pairs are held."""


def accuracy(y: Labels, score: Floats, weights: Floats) -> Floats:
    """Return the share of samples whose highest-scored class is the right one; the first class wins a tie."""
    return weighted_mean(score.argmax(axis=1) == y, weights)


def balanced_accuracy(y: Labels, score: Floats, weights: Floats) -> Floats:
    """Return mean recall over the classes that occur, as `sklearn.metrics.balanced_accuracy_score`."""
    hits, _, actual = class_counts(y, score, weights)
    return mean_of_defined(ratio(hits, actual))


def macro_f1(y: Labels, score: Floats, weights: Floats) -> Floats:
    """Return the mean F1 over the classes that occur in `y`, as `sklearn.metrics.f1_score(labels=np.unique(y),
    average="macro", zero_division=0)`."""
    hits, predicted, actual = class_counts(y, score, weights)
    return mean_of_defined(np.where(actual > 0, ratio(2 * hits, predicted + actual), np.nan))


def macro_auroc(y: Labels, score: Floats, weights: Floats) -> Floats:
    """Return the mean one-against-rest AUROC over the classes that occur, as MedMNIST's evaluator defines it. A class
    without positives or negatives has none and is left out of the mean."""
    areas = [auroc(y == c, score[:, c], weights) for c in np.unique(y)]
    return mean_of_defined(np.reshape(areas, (-1, len(weights))).T)


def auroc(positive: Bools, score: Floats, weights: Floats) -> Floats:
    """Return the area under the ROC curve, ties counted half: the sum over positives p of w(p) * (N(below p) + N(tied
    with p) / 2), divided by P * N, with N weights of negatives (Hanley and McNeil 1982). Equals
    `roc_auc_score(sample_weight=...)`."""
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    # One sample per row, so that sorting moves whole rows and sums run along memory.
    rows = np.ascontiguousarray(weights.T)[order]
    at = np.flatnonzero(positive[order])
    own = rows[at]
    first, last = (np.searchsorted(ranked, ranked[at], side=side) for side in ("left", "right"))
    # Sums of the first 0, 1, ..., n rows.
    everything, positives = (np.cumsum(np.pad(part, ((1, 0), (0, 0))), axis=0) for part in (rows, own))
    below = everything[first] - positives[np.searchsorted(at, first)]
    not_above = everything[last] - positives[np.searchsorted(at, last)]
    area = np.einsum("pb,pb->b", own, below + not_above) / 2
    total = positives[-1]
    return ratio(area, total * (everything[-1] - total))


def average_precision(positive: Bools, score: Floats, weights: Floats) -> Floats:
    """Return the sum over thresholds (one for equal scores) of precision times the recall gained there. Equals
    `sklearn.metrics.average_precision_score(sample_weight=...)`; NaN without positives."""
    hits, alarms = _at_thresholds(positive, score, weights)
    gained = np.diff(hits, axis=0, prepend=0.0) * ratio(hits, hits + alarms)
    return ratio(np.nansum(gained, axis=0), hits[-1:].sum(axis=0))


def quadratic_kappa(y: Labels, score: Floats, weights: Floats) -> Floats:
    """Return the quadratic weighted kappa of grades 0 to C - 1 (Cohen 1968), as `sklearn.metrics.cohen_kappa_score(
    weights="quadratic")`: one minus the mean squared distance of grade and prediction over that of independent ones
    with the same frequencies. NaN where that is zero."""
    grade, given = y.astype(np.float64), score.argmax(axis=1).astype(np.float64)
    first, second, mine, other = (weighted_mean(v, weights) for v in (grade, given, grade**2, given**2))
    chance = mine - 2 * first * second + other
    return 1 - ratio(weighted_mean((grade - given) ** 2, weights), np.where(chance > 1e-12, chance, 0.0))


def sensitivity_at(positive: Bools, score: Floats, weights: Floats, specificity: float) -> Floats:
    """Return the highest sensitivity of a threshold whose specificity is at least this; samples that score at least the
    threshold are found. Each resample has its own threshold. NaN without positives or negatives."""
    hits, alarms = _at_thresholds(positive, score, weights)
    positives, negatives = hits[-1:].sum(axis=0), alarms[-1:].sum(axis=0)
    allowed = (alarms <= (1 - specificity) * negatives + 1e-9).sum(axis=0)  # alarms ascend
    best = np.take_along_axis(np.pad(hits, ((1, 0), (0, 0))), allowed[None], axis=0)[0]
    return np.where(negatives > 0, ratio(best, positives), np.nan)


def _at_thresholds(positive: Bools, score: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return positives and negatives that score at least each threshold, float64 (thresholds, B), from the highest."""
    order = np.argsort(-score, kind="stable")
    rows, found = np.ascontiguousarray(weights.T)[order], positive[order, None]
    thresholds = np.flatnonzero(np.diff(score[order], append=-np.inf))
    hits, alarms = (np.cumsum(np.where(mask, rows, 0.0), axis=0)[thresholds] for mask in (found, ~found))
    return hits, alarms


def net_benefit(positive: Bools, score: Floats, weights: Floats, threshold: float) -> Floats:
    """Return true positives minus false positives times the odds of a threshold probability, per sample (Vickers and
    Elkin 2006): what a decision gains over treating nobody. Samples at or above the threshold are treated."""
    odds = threshold / (1 - threshold)
    return weighted_mean((score >= threshold) * np.where(positive, 1.0, -odds), weights)


def recall_at(rank: Floats, k: int, weights: Floats) -> Floats:
    """Return R@k as CLIP papers use the word: the share of queries with a positive among the first k. `rank`: float64
    (n,), from 0."""
    return weighted_mean(rank < k, weights)


def weighted_mean(values: Floats | Bools, weights: Floats) -> Floats:
    """Return the mean of `values` (n,) in each resample."""
    return ratio(weights @ values.astype(np.float64), weights.sum(axis=1))


def weighted_median(values: Floats, weights: Floats) -> Floats:
    """Return the median of `values` (n,) in each resample: the mean of the two middle ones where they differ."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    result = np.full(len(weights), np.nan)
    for b, counts in enumerate(np.cumsum(weights[:, order], axis=1)):
        if len(counts) and counts[-1] > 0:
            low, high = (np.searchsorted(counts, counts[-1] / 2, side=side) for side in ("left", "right"))
            result[b] = (ranked[low] + ranked[min(high, len(ranked) - 1)]) / 2
    return result


def concordance(risk: Floats, time: Floats, event: Bools, weights: Floats) -> Floats:
    """Return Harrell's concordance index (Harrell et al. 1996, Statistics in Medicine 15:361, section 5); NaN where no
    pair can be compared. Two subjects can be when the one with the shorter time had the event, or both have the same
    time and one was censored; concordant when the one who died first had the higher risk, half for equal risks. `risk`:
    float64 (n,), higher means an earlier event. `time`: float64 (n,). `event`: bool (n,), whether it was seen."""
    right, every = np.zeros(len(weights)), np.zeros(len(weights))
    for start in range(0, len(risk), SUBJECTS):
        part = slice(start, start + SUBJECTS)
        own_risk, own_time = risk[part, None], time[part, None]
        comparable = event[part, None] & ((own_time < time) | ((own_time == time) & ~event))
        points = comparable * ((own_risk > risk) + 0.5 * (own_risk == risk))
        right += np.einsum("bi,bi->b", weights[:, part], weights @ points.T)
        every += np.einsum("bi,bi->b", weights[:, part], weights @ comparable.T.astype(np.float64))
    return ratio(right, every)


class Censoring:
    """Kaplan and Meier's estimate of the chance to be uncensored, in each of B resamples: the denominators of inverse
    probability of censoring weights. Of equal times, events come before censorings."""

    def __init__(self, time: Floats, event: Bools, weights: Floats) -> None:
        order = np.argsort(time, kind="stable")
        self._times, self._place = np.unique(time, return_inverse=True)
        rows, seen = np.ascontiguousarray(weights.T)[order], event[order, None]
        starts = np.searchsorted(time[order], self._times)
        died, lost = (np.add.reduceat(np.where(mask, rows, 0.0), starts, axis=0) for mask in (seen, ~seen))
        at_risk = np.cumsum((died + lost)[::-1], axis=0)[::-1] - died
        steps = np.where(at_risk > 0, 1 - np.nan_to_num(ratio(lost, at_risk)), 1.0)
        self._uncensored = np.cumprod(np.pad(steps, ((1, 0), (0, 0)), constant_values=1.0), axis=0)

    def inverse(self, weights: Floats) -> Floats:
        """Return weights, float64 (B, n), divided by the chance to be uncensored just before each subject's time."""
        chance = self._uncensored[self._place].T
        return np.divide(weights, chance, out=np.zeros_like(weights), where=chance > 0)

    def at(self, time: float) -> Floats:
        """Return the chance to be uncensored at a time, float64 (B,)."""
        return np.asarray(self._uncensored[np.searchsorted(self._times, time, side="right")])


def dynamic_auroc(risk: Floats, time: Floats, event: Bools, weights: Floats, inverse: Floats, at: float) -> Floats:
    """Return the cumulative/dynamic area under the ROC curve at a time (Uno et al. 2007; Hung and Chiang 2010): of
    those with an event until then against those who live longer, events with `inverse` weights of `Censoring`. Equals
    `sksurv.metrics.cumulative_dynamic_auc`; NaN where either side is empty."""
    case, rows = event & (time <= at), (event & (time <= at)) | (time > at)
    return auroc(case[rows], risk[rows], np.where(case, inverse, weights)[:, rows])


def integrated_brier(alive: Floats, time: Floats, event: Bools, weights: Floats, times: tuple[float, ...]) -> Floats:
    """Return the Brier score of survival chances, `alive` float64 (n, T), integrated over `times` by the trapezoidal
    rule and divided by their span (Graf et al. 1999, equations 5 and 6). Equals
    `sksurv.metrics.integrated_brier_score`; NaN where nobody is seen beyond the last time."""
    censoring = Censoring(time, event, weights)
    inverse, scores = censoring.inverse(weights), []
    for chance, at in zip(alive.T, times, strict=True):
        died = inverse @ (chance**2 * (event & (time <= at)))
        lives = time > at
        scores.append(died + ratio(weights @ ((1 - chance) ** 2 * lives), censoring.at(at) * (weights @ lives > 0)))
    return ratio(trapezoid(scores, times, axis=0), (times[-1] - times[0]) * weights.sum(axis=1))


def class_counts(y: Labels, score: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Hits, predictions and occurrences of every class, each float64 (B, C)."""
    classes = np.eye(score.shape[1])
    predicted, actual = classes[score.argmax(axis=1)], classes[y]
    return weights @ (predicted * actual), weights @ predicted, weights @ actual


def mean_of_defined(values: Floats) -> Floats:
    """Return the mean over axis 1 of the values that exist: (B, C) to (B,), NaN where none does."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1).astype(np.float64))


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Return a quotient, NaN where the denominator is not above zero."""
    result = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result
