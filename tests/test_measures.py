"""Measures against independent references: scikit-learn, lifelines, torchmetrics and scikit-survival where these are
installed, and loops written from the definitions; on random, tied and tiny data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter, KaplanMeierFitter
from scipy.optimize import brentq
from sklearn.metrics import brier_score_loss, cohen_kappa_score, roc_curve

from mmkd.evaluate.calibration import (
    best_temperature,
    brier,
    brier_parts,
    calibration_error,
    events,
    lower_edges,
    scaled,
)
from mmkd.evaluate.measured import _calibration, probabilities
from mmkd.evaluate.metrics import (
    Censoring,
    dynamic_auroc,
    integrated_brier,
    net_benefit,
    quadratic_kappa,
    sensitivity_at,
)
from mmkd.evaluate.predictions import Predictions, Validation
from mmkd.evaluate.scoring import BootstrapSettings, Scoring
from mmkd.evaluate.statistics import resampled
from mmkd.evaluate.survival import breslow, interpolated

Answers = tuple[np.ndarray, np.ndarray, np.ndarray]
KINDS = ("random", "tied", "tiny")


def answers(kind: str, classes: int, seed: int = 0) -> Answers:
    """Classes, probabilities, and counts of a data set and two resamples of it."""
    rng = np.random.default_rng([seed, classes])
    n = 7 if kind == "tiny" else 300
    score = rng.dirichlet(np.ones(classes) * 0.8, n)
    if kind == "tied":
        score = rng.multinomial(4, np.ones(classes) / classes, n) / 4
    y = np.array([rng.choice(classes, p=0.7 * p + 0.3 / classes) for p in score])
    weights = np.stack([np.ones(n), *rng.multinomial(n, np.ones(n) / n, 2)]).astype(np.float64)
    return y, score, weights


def repeated(weights: np.ndarray, *arrays: np.ndarray) -> list[list[np.ndarray]]:
    """The rows of each resample, as often as they occur."""
    return [[np.repeat(one, counts.astype(int), axis=0) for one in arrays] for counts in weights]


def looped_error(p: np.ndarray, happened: np.ndarray, edges: np.ndarray) -> float:
    total = 0.0
    for low, high in itertools.pairwise([*edges, np.inf]):
        inside = [i for i in range(len(p)) if low <= p[i] < high]
        if inside:
            total += abs(sum(p[i] for i in inside) - sum(happened[i] for i in inside))
    return total / len(p)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_calibration_errors_are_those_of_a_loop_over_bins(kind: str, classes: int) -> None:
    y, score, weights = answers(kind, classes)
    p, happened = events(y, score)
    assert p.tolist() == (score[:, 1] if classes == 2 else score.max(axis=1)).tolist()
    for equal_mass in (False, True):
        found = calibration_error(p, happened, weights, 10, equal_mass=equal_mass)
        edges = lower_edges(p, 10, equal_mass)
        expected = [looped_error(*rows, edges) for rows in repeated(weights, p, happened)]
        assert found == pytest.approx(expected, abs=1e-12)
    if kind == "random":  # bins at quantiles hold a tenth each
        assert np.ptp(np.histogram(p, [*lower_edges(p, 10, True), 1.01])[0]) <= 1


@pytest.mark.parametrize("classes", [2, 5])
def test_calibration_error_is_torchmetrics(classes: int) -> None:
    tm = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
    import torch

    y, score, weights = answers("random", classes)
    given_ = torch.from_numpy(score[:, 1].copy() if classes == 2 else score), torch.from_numpy(y)
    theirs = (
        tm.binary_calibration_error(*given_, n_bins=15)
        if classes == 2
        else tm.multiclass_calibration_error(*given_, num_classes=classes, n_bins=15)
    )
    assert calibration_error(*events(y, score), weights, 15)[0] == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_brier_score_is_scikit_learns_and_its_parts_add_up(kind: str, classes: int) -> None:
    y, score, weights = answers(kind, classes)
    found = brier(y, score, weights)
    expected = [
        brier_score_loss(t, p[:, 1]) if classes == 2 else np.square(p - np.eye(classes)[t]).sum(axis=1).mean()
        for t, p in repeated(weights, y, score)
    ]
    assert found == pytest.approx(expected, abs=1e-12)
    reliability, resolution, uncertainty = brier_parts(y, score, weights, 10)
    assert reliability - resolution + uncertainty == pytest.approx(found, abs=1e-12)
    for b, (t, p) in enumerate(repeated(weights, y, score)):
        own = own_uncertainty = 0.0
        for c in range(classes) if classes > 2 else (1,):
            place = np.minimum((p[:, c] * 10 + 1e-9).astype(int), 9)
            own += sum(
                (place == k).mean() * (p[place == k, c].mean() - (t[place == k] == c).mean()) ** 2 for k in set(place)
            )
            own_uncertainty += np.var(t == c)
        assert uncertainty[b] == pytest.approx(own_uncertainty, abs=1e-12)
        if kind != "random":  # whose probabilities may lie within 1e-9 below an edge
            assert reliability[b] == pytest.approx(own, abs=1e-12)


def test_murphys_parts_where_bins_hold_one_probability() -> None:
    """Murphy 1973: with one forecast in each bin the resolution is the variance of the frequencies."""
    p = np.repeat([0.05, 0.45, 0.85], [20, 30, 50])
    y = (np.arange(100) % np.repeat([10, 3, 2], [20, 30, 50]) == 0).astype(np.int64)
    _, resolution, _ = brier_parts(y, np.column_stack([1 - p, p]), np.ones((1, 100)), 10)
    shares = [y[p == one].mean() for one in (0.05, 0.45, 0.85)]
    assert resolution[0] == pytest.approx(np.average((np.array(shares) - y.mean()) ** 2, weights=[20, 30, 50]))


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_calibration_properties(seed: int, kind: str, classes: int) -> None:
    y, score, weights = answers(kind, classes, seed)
    p, happened = events(y, score)
    error = calibration_error(p, happened, weights, 8)
    assert ((error >= 0) & (error <= 1)).all()
    # A finer partition never has a smaller error (the triangle inequality), one bin is the difference of the means.
    assert (calibration_error(p, happened, weights, 16) >= error - 1e-12).all()
    one = calibration_error(p, happened, weights, 1)
    assert one == pytest.approx(np.abs(weights @ (p - happened)) / weights.sum(axis=1))
    # The order of the samples and a sample that occurs twice change nothing.
    order = np.random.default_rng(seed).permutation(len(p))
    assert calibration_error(p[order], happened[order], weights[:, order], 8) == pytest.approx(error, abs=1e-12)
    (reliability, resolution, _) = brier_parts(y, score, weights, 8)
    assert (reliability >= 0).all()
    assert (resolution <= 2).all()


def test_the_temperature_is_where_the_slope_of_the_log_loss_is_zero() -> None:
    for kind, classes in itertools.product(("random", "tied"), (2, 4)):
        y, score, _ = answers(kind, classes)
        score = (score + 1e-3) / (score + 1e-3).sum(axis=1, keepdims=True)
        logits = np.log(score)

        def slope(sharpness: float, logits: np.ndarray = logits, y: np.ndarray = y) -> float:
            p = np.exp(logits * sharpness)
            p /= p.sum(axis=1, keepdims=True)
            return float(np.mean((p * logits).sum(axis=1) - logits[np.arange(len(y)), y]))

        assert best_temperature(y, score) == pytest.approx(1 / brentq(slope, 0.01, 50), rel=1e-5)
    # Scores that were sharpened get their temperature back; certain ones stay finite, and nothing becomes unordered.
    y, score, _ = answers("random", 3)
    assert best_temperature(y, scaled(score, 0.25)) == pytest.approx(4 * best_temperature(y, score), rel=1e-5)
    certain = np.eye(3)[y]
    assert np.isfinite(best_temperature(y, certain))
    assert scaled(score, 7.0).argmax(axis=1).tolist() == score.argmax(axis=1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_kappa_is_scikit_learns(kind: str) -> None:
    y, score, weights = answers(kind, 5)
    found = quadratic_kappa(y, score, weights)
    expected = [
        cohen_kappa_score(t, p.argmax(axis=1), weights="quadratic", labels=range(5))
        for t, p in repeated(weights, y, score)
    ]
    assert found == pytest.approx(expected, abs=1e-12)
    assert math.isnan(quadratic_kappa(np.zeros(4, np.int64), np.eye(5)[[0] * 4], np.ones((1, 4)))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_sensitivity_at_a_specificity_and_net_benefit_are_those_of_every_threshold(kind: str) -> None:
    y, score, weights = answers(kind, 2)
    for share in (0.5, 0.8, 0.9, 0.95):
        expected = []
        for t, p in repeated(weights, y, score[:, 1]):
            rates = [((p[t == 0] < cut).mean(), (p[t == 1] >= cut).mean()) for cut in (*np.unique(p), np.inf)]
            expected.append(max(sensitivity for specificity, sensitivity in rates if specificity >= share - 1e-12))
        assert sensitivity_at(y == 1, score[:, 1], weights, share) == pytest.approx(expected, abs=1e-12)
        false, true, _ = roc_curve(y, score[:, 1], drop_intermediate=False)
        assert expected[0] == pytest.approx(true[false <= 1 - share + 1e-12].max())
    for cut in (0.1, 0.25, 0.5):
        expected = []
        for t, p in repeated(weights, y, score[:, 1]):
            treated = [one for one, chance in zip(t, p, strict=True) if chance >= cut]
            expected.append((treated.count(1) - treated.count(0) * cut / (1 - cut)) / len(t))
        assert net_benefit(y == 1, score[:, 1], weights, cut) == pytest.approx(expected, abs=1e-12)
    nobody = sensitivity_at(np.ones(4, bool), np.arange(4.0), np.ones((1, 4)), 0.9)
    assert math.isnan(nobody[0])


def test_conformal_threshold_is_the_rank_of_the_definition_and_covers() -> None:
    y, score, _ = answers("random", 4)
    for share, m in itertools.product((0.5, 0.8, 0.9, 0.95), (5, 9, 19, 300)):
        odd = sorted(1 - score[i, y[i]] for i in range(m))
        rank = next((k for k in range(1, m + 1) if k / (m + 1) >= share - 1e-12), None)
        expected = 0.0 if rank is None else 1 - odd[rank - 1]
        assert Validation(y[:m], score[:m]).threshold(share) == pytest.approx(expected, abs=1e-15)
    # Over many divisions of exchangeable samples, the share of covered ones is at least what was asked for.
    rng, covered = np.random.default_rng(1), []
    for _ in range(400):
        order = rng.permutation(len(y))
        held, test = order[:50], order[50:]
        limit = Validation(y[held], score[held]).threshold(0.9)
        covered.append((score[test, y[test]] >= limit).mean())
    assert 0.9 <= np.mean(covered) <= 0.9 + 1 / 51 + 0.01


def cohort(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times, events, risks, and counts of a cohort and two resamples."""
    rng = np.random.default_rng(seed)
    n = 12 if kind == "tiny" else 150
    risk = rng.normal(size=n)
    death, lost = rng.exponential(8 * np.exp(-risk)), rng.exponential(10, n)
    time = np.minimum(death, lost)
    if kind == "tied":
        time, risk = np.ceil(time), np.round(risk)
    weights = np.stack([np.ones(n), *rng.multinomial(n, np.ones(n) / n, 2)]).astype(np.float64)
    return time, death <= lost, risk, weights


def chance_uncensored(time: np.ndarray, event: np.ndarray, at: float, *, before: bool = False) -> float:
    """The product over times of censorings, of those still at risk after the events of that time."""
    chance = 1.0
    for t in sorted(set(time[~event].tolist())):
        if t < at or (t == at and not before):
            at_risk = sum(time > t) + sum((time == t) & ~event)
            chance *= 1 - sum((time == t) & ~event) / at_risk
    return chance


@pytest.mark.parametrize("kind", KINDS)
def test_survival_scores_are_those_of_loops_over_pairs_and_patients(kind: str) -> None:
    time, event, risk, weights = cohort(kind)
    times = tuple(np.quantile(time[event], [0.2, 0.5, 0.7]).tolist())
    alive = np.exp(-np.outer(np.exp(risk), times) / 8)
    inverse = Censoring(time, event, weights).inverse(weights)
    for at in times:
        expected = []
        for t, e, r in repeated(weights, time, event, risk):
            points = total = 0.0
            for i in np.flatnonzero(e & (t <= at)):
                weight = 1 / chance_uncensored(t, e, t[i], before=True)
                for j in np.flatnonzero(t > at):
                    total += weight
                    points += weight * (1.0 if r[i] > r[j] else 0.5 if r[i] == r[j] else 0.0)
            expected.append(points / total if total else math.nan)
        assert dynamic_auroc(risk, time, event, weights, inverse, at) == pytest.approx(expected, abs=1e-10, nan_ok=True)
    expected = []
    for t, e, a in repeated(weights, time, event, alive):
        scores = []
        for k, at in enumerate(times):
            parts = [
                a[i, k] ** 2 / chance_uncensored(t, e, t[i], before=True)
                if e[i] and t[i] <= at
                else (1 - a[i, k]) ** 2 / chance_uncensored(t, e, at)
                if t[i] > at
                else 0.0
                for i in range(len(t))
            ]
            scores.append(sum(parts) / len(t) if (t > at).any() else math.nan)
        spans = zip(itertools.pairwise(times), itertools.pairwise(scores), strict=True)
        areas = [(end - start) * (one + other) / 2 for (start, end), (one, other) in spans]
        expected.append(sum(areas) / (times[-1] - times[0]))
    assert integrated_brier(alive, time, event, weights, times) == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_survival_scores_without_anybody_beyond_have_no_value() -> None:
    time, event, risk, weights = cohort("random")
    late = (float(np.median(time)), float(time.max() + 1))
    assert np.isnan(integrated_brier(np.full((len(time), 2), 0.5), time, event, weights, late)).all()
    inverse = Censoring(time, event, weights).inverse(weights)
    assert np.isnan(dynamic_auroc(risk, time, event, weights, inverse, late[1])).all()
    assert np.isnan(dynamic_auroc(risk, time, event, weights, inverse, float(time.min() / 2))).all()


def test_censoring_is_lifelines_kaplan_meier() -> None:
    time, event, _, weights = cohort("random")
    fitted = KaplanMeierFitter().fit(time, ~event)
    for at in np.quantile(time, [0.0, 0.3, 0.8]):
        assert Censoring(time, event, weights).at(at)[0] == pytest.approx(fitted.survival_function_at_times(at).item())


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_survival_scores_are_scikit_survivals(kind: str) -> None:
    sksurv = pytest.importorskip("sksurv.metrics", reason="scikit-survival (GPL) is not installed")
    time, event, risk, weights = cohort("random")
    if kind == "tied":  # of risks; scikit-survival takes an event and a censoring at one time in another order
        risk = np.round(risk)
    times = tuple(np.quantile(time, [0.2, 0.5, 0.8]).tolist())
    table = np.array(list(zip(event, time, strict=True)), dtype=[("event", bool), ("time", float)])
    theirs = sksurv.cumulative_dynamic_auc(table, table, risk, times)[0]
    inverse = Censoring(time, event, weights).inverse(weights)
    assert [dynamic_auroc(risk, time, event, weights, inverse, at)[0] for at in times] == pytest.approx(theirs)
    alive = np.exp(-np.outer(np.exp(risk), times) / 8)
    integral = sksurv.integrated_brier_score(table, table, alive, times)
    assert integrated_brier(alive, time, event, weights, times)[0] == pytest.approx(integral)


def test_breslows_curves_are_lifelines() -> None:
    import pandas as pd

    time, event, risk, _ = cohort("random")
    table = pd.DataFrame({"time": time, "event": event, "risk": risk})
    fitted = CoxPHFitter().fit(table, "time", "event")
    log_hazard = risk * fitted.params_["risk"]
    times = tuple(np.quantile(time, [0.1, 0.5, 0.9]).tolist())
    theirs = fitted.predict_survival_function(table.iloc[:5], times=times).to_numpy().T
    assert breslow(log_hazard, time, event, log_hazard[:5], times) == pytest.approx(theirs, abs=1e-6)
    far = breslow(log_hazard + 900, time, event, log_hazard[:5] + 900, times)  # only differences of hazards count
    assert far == pytest.approx(theirs, abs=1e-6)


def test_chances_of_discrete_hazards_are_linear_between_knots() -> None:
    logits = np.array([[0.0, 0.0], [-50.0, 50.0]])
    found = interpolated(logits, np.array([0.0, 10.0, 30.0]), (5.0, 10.0, 20.0, 99.0))
    assert found == pytest.approx(np.array([[0.75, 0.5, 0.375, 0.25], [1.0, 1.0, 0.5, 0.0]]))


@pytest.mark.parametrize(("name", "shifted"), [("ece@10", True), ("resolution@10", True), ("brier", False)])
def test_resamples_of_what_chance_enlarges_are_shifted_to_the_value(name: str, shifted: bool) -> None:
    """Without it, nominal 95 % intervals of the resolution held the truth in 83 % of 500 simulated studies."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=80)
    y, p = (rng.random(80) < 1 / (1 + np.exp(-z))).astype(np.int64), 1 / (1 + np.exp(-1.4 * z))
    ids, every = np.array([str(i) for i in range(80)], dtype=object), np.ones(80, dtype=bool)
    answered = Predictions(ids, ids, ids, y, np.stack([1 - p, p], axis=1), every, ("a", "b"))
    scoring = Scoring("s", _calibration("", probabilities, 10), name)
    asked = {"bootstrap": BootstrapSettings(n=300), "name": "s", "parts": {"": every}}
    one = resampled(answered, [name], scoring, **asked)["", name]  # type: ignore[arg-type]
    assert (abs(one.draws.mean() - one.value) < 1e-3 * one.value) == shifted
