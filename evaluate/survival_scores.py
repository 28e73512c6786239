"""Scores of survival at given times, with weights for censoring, and survival curves from log-hazards. Subjects: `time`
float64 (n,), `event` bool (n,), whether it was seen; `weights` as in `mmkd.evaluate.metrics`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

from mmkd.evaluate.metrics import Floats, auroc, ratio


class Censoring:
    """Kaplan and Meier's estimate of the chance to be uncensored, in each of B resamples: the denominators of inverse
    probability of censoring weights. Of equal times, events come before censorings."""

    def __init__(self, time: Floats, event: NDArray[np.bool_], weights: Floats) -> None:
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


def dynamic_auroc(
    risk: Floats, time: Floats, event: NDArray[np.bool_], weights: Floats, inverse: Floats, at: float
) -> Floats:
    """Return the cumulative/dynamic area under the ROC curve at a time (Uno et al. 2007; Hung and Chiang 2010): of
    those with an event until then against those who live longer, events with `inverse` weights of `Censoring`. Equals
    `sksurv.metrics.cumulative_dynamic_auc`; NaN where either side is empty."""
    case, rows = event & (time <= at), (event & (time <= at)) | (time > at)
    return auroc(case[rows], risk[rows], np.where(case, inverse, weights)[:, rows])


def integrated_brier(
    alive: Floats, time: Floats, event: NDArray[np.bool_], weights: Floats, times: tuple[float, ...]
) -> Floats:
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


def breslow(
    seen: Floats, time: Floats, event: NDArray[np.bool_], log_hazard: Floats, times: tuple[float, ...]
) -> Floats:
    """Return chances of survival, float64 (m, T), at `times` for subjects with these log-hazards (m,), with the
    baseline of subjects `seen` in training, float64 (n,): Breslow 1972."""
    highest = seen.max()
    deaths, order = np.unique(time[event], return_counts=True), np.argsort(time, kind="stable")
    at_risk = np.cumsum(np.exp(seen[order] - highest)[::-1])[::-1]
    baseline = np.cumsum(deaths[1] / at_risk[np.searchsorted(time[order], deaths[0])])
    until = np.append(0.0, baseline)[np.searchsorted(deaths[0], times, side="right")]
    return np.exp(-np.outer(np.exp(log_hazard - highest), until))


def interpolated(logits: Floats, knots: Floats, times: tuple[float, ...]) -> Floats:
    """Return chances of survival, float64 (m, T), from the logits of discrete hazards, float64 (m, K), in bins between
    knots, float64 (K + 1,), linear within bins: constant density interpolation of Kvamme and Borgan 2021."""
    ends = np.cumprod(1 / (1 + np.exp(logits)), axis=1)
    return np.array([np.interp(times, knots, row) for row in np.pad(ends, ((0, 0), (1, 0)), constant_values=1.0)])
