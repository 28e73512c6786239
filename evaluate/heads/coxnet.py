"""Elastic-net Cox regression: one path of penalties, the best of them chosen by cross-validated partial likelihood.
scikit-survival has this model, but under the GPL; lifelines' needs minutes for 512 columns. Tests hold the likelihood
to torchsurv's and lifelines', and the coefficients to scikit-survival's."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.preprocessing import StandardScaler

from mmkd.base.arrays import Bools, Floats, Objects
from mmkd.base.config import Frozen
from mmkd.evaluate.splits import draw_folds
from mmkd.store import UserError

MAX_STEPS = 5000
"""Steps of one penalty; a fit that needs more has not converged."""
TOLERANCE = 1e-5
"""Steps of one penalty stop when no coefficient (of standardized columns) moves by more."""


class PartialLikelihood:
    """Cox's negative log partial likelihood with Efron's treatment of ties (Efron 1977, JASA 72:557, equation 5.2)."""

    def __init__(self, time: Floats, event: Bools) -> None:
        self._order = np.argsort(time, kind="stable")
        ranked, seen = time[self._order], event[self._order]
        _, self._first, group = np.unique(ranked, return_index=True, return_inverse=True)
        self._group, self._event = group, seen.astype(np.float64)
        at = np.flatnonzero(seen)
        deaths = np.bincount(group, weights=self._event, minlength=len(self._first))
        before = np.concatenate([[0.0], np.cumsum(deaths)])[:-1]
        # The l-th of d deaths at one time leaves l/d of them out of its own risk set.
        self._share = (np.arange(len(at)) - before[group[at]]) / deaths[group[at]]
        self._at, self._own = at, group[at]

    def __call__(self, log_hazard: Floats) -> tuple[float, Floats]:
        """Return value and gradient at log-hazards float64 (n,); the gradient is float64 (n,)."""
        value, hazard, denominator = self._sums(log_hazard)
        inverse = np.bincount(self._own, weights=1 / denominator, minlength=len(self._first))
        partial = np.bincount(self._own, weights=self._share / denominator, minlength=len(self._first))
        slope = hazard * (np.cumsum(inverse)[self._group] - self._event * partial[self._group]) - self._event
        gradient = np.empty_like(slope)
        gradient[self._order] = slope
        return value, gradient

    def value(self, log_hazard: Floats) -> float:
        """Return the value alone, in half the time."""
        return self._sums(log_hazard)[0]

    def _sums(self, log_hazard: Floats) -> tuple[float, Floats, Floats]:
        """Return value, hazards in order of time (n,), and what each event is divided by (events,)."""
        eta = np.clip((log_hazard - log_hazard.max())[self._order], -50.0, 0.0)  # no hazard of zero to divide by
        hazard = np.exp(eta)
        at_risk = np.cumsum(hazard[::-1])[::-1][self._first]
        dying = np.bincount(self._group, weights=hazard * self._event, minlength=len(self._first))
        denominator = at_risk[self._own] - self._share * dying[self._own]
        return float(np.log(denominator).sum() - eta[self._at].sum()), hazard, denominator


class CoxnetSettings(Frozen):
    """Elastic-net Cox regression on mean-pooled features."""

    l1_ratio: float = Field(default=0.5, gt=0, le=1)
    alphas: int = Field(default=20, ge=1)
    smallest_alpha: float = Field(default=0.05, gt=0, lt=1)
    """The path ends at this share of the smallest penalty that leaves no coefficient."""
    inner_folds: int = Field(default=5, ge=2)


@dataclass(frozen=True)
class Cohort:
    """Subjects with follow-up. x: float64 (n, D); time: float64 (n,); event: bool (n,); group: str (n,)."""

    x: Floats
    time: Floats
    event: Bools
    group: Objects

    def take(self, chosen: NDArray[Any]) -> "Cohort":
        return Cohort(self.x[chosen], self.time[chosen], self.event[chosen], self.group[chosen])


@dataclass(frozen=True)
class CoxModel:
    """A fitted model: coefficients of standardized columns."""

    scaler: StandardScaler
    coefficients: Floats
    alpha: float
    converged: bool

    def risk(self, x: Floats) -> Floats:
        """Return log-hazard of x (n, D) against the average subject, float64 (n,)."""
        return np.asarray(self.scaler.transform(x) @ self.coefficients, dtype=np.float64)


def fit_coxnet(cohort: Cohort, settings: CoxnetSettings, seed: int) -> CoxModel:
    """Fit the penalty that predicts held-out subjects best, then refit on all. Raises UserError if there is no event,
    or too few subjects to choose the penalty on."""
    if not cohort.event.any():
        raise UserError(f"all {len(cohort.time)} training subjects are censored; a Cox model needs events")
    scaler = StandardScaler()
    x = scaler.fit_transform(cohort.x)
    alphas = penalties(x, cohort, settings)
    fold = draw_folds(cohort.event.astype(np.int64), cohort.group, settings.inner_folds, seed)
    whole = PartialLikelihood(cohort.time, cohort.event)
    lost = np.zeros(len(alphas))
    for number in range(settings.inner_folds):
        rest = cohort.take(fold != number)
        if not rest.event.any():
            continue
        everyone = StandardScaler().fit(rest.x).transform(cohort.x)
        inner, part = everyone[fold != number], PartialLikelihood(rest.time, rest.event)
        for i, (beta, converged) in enumerate(zip(*fit_path(inner, part, alphas, settings.l1_ratio), strict=True)):
            # Verweij and van Houwelingen 1993: what the held-out subjects add to the partial likelihood.
            added = whole.value(everyone @ beta) - part.value(inner @ beta)
            lost[i] += added if converged else np.inf
    best = int(np.argmin(lost))
    path, converged = fit_path(x, whole, alphas[: best + 1], settings.l1_ratio)
    return CoxModel(scaler, path[best], float(alphas[best]), bool(converged[best]))


def penalties(x: Floats, cohort: Cohort, settings: CoxnetSettings) -> Floats:
    """Penalties from the smallest that leaves no coefficient down to a share of it, float64 (steps,)."""
    _, gradient = PartialLikelihood(cohort.time, cohort.event)(np.zeros(len(x)))
    largest = np.abs(x.T @ gradient).max() / len(x) / settings.l1_ratio
    return np.asarray(np.geomspace(1.0, settings.smallest_alpha, settings.alphas) * max(largest, TOLERANCE))


def fit_path(x: Floats, likelihood: PartialLikelihood, alphas: Floats, l1_ratio: float) -> tuple[Floats, Bools]:
    """Minimize L(x b) / n + alpha * (l1_ratio * |b|_1 + (1 - l1_ratio) / 2 * |b|_2^2) for each of `alphas`, float64
    (steps,), descending, by accelerated proximal steps (Beck and Teboulle 2009, FISTA with backtracking), whose
    momentum restarts when it points uphill (O'Donoghue and Candes 2015, section 3.2). Returns coefficients,
    float64 (steps, D), and which converged, bool (steps,). `x`: float64 (n, D), standardized."""
    n, beta, curvature = len(x), np.zeros(x.shape[1]), 1.0
    path, hazard, converged = np.empty((len(alphas), x.shape[1])), np.zeros(n), np.zeros(len(alphas), dtype=bool)
    for i, alpha in enumerate(alphas.tolist()):
        l1, ridge = alpha * l1_ratio, alpha * (1 - l1_ratio)
        ahead, ahead_hazard, momentum = beta, hazard, 1.0
        for _ in range(MAX_STEPS):
            loss, gradient = likelihood(ahead_hazard)
            value, slope = loss / n + ridge / 2 * (ahead @ ahead), x.T @ gradient / n + ridge * ahead
            curvature *= 0.9
            while True:
                to = ahead - slope / curvature
                moved = np.sign(to) * np.maximum(np.abs(to) - l1 / curvature, 0.0)
                moved_hazard, step = x @ moved, moved - ahead
                bound = value + slope @ step + curvature / 2 * step @ step
                # Written so that NaN ends the search; the path then counts as not converged.
                if not likelihood.value(moved_hazard) / n + ridge / 2 * (moved @ moved) > bound + 1e-12 * abs(bound):
                    break
                curvature *= 2
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            if (ahead - moved) @ (moved - beta) > 0:
                momentum = following = 1.0
            share = (momentum - 1) / following
            largest = float(np.abs(moved - beta).max(initial=0.0))
            ahead, ahead_hazard = moved + share * (moved - beta), moved_hazard + share * (moved_hazard - hazard)
            beta, hazard, momentum = moved, moved_hazard, following
            if largest < TOLERANCE:
                converged[i] = True
                break
        path[i] = beta
    return path, converged
