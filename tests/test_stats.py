"""Resampling, paired differences and tests across data sets."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control, norm, rankdata, wilcoxon
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mmkd.evaluate import metrics
from mmkd.evaluate.metrics import recall_at
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import BootstrapSettings, Metric, Scoring, clustered_resamples, group_counts
from mmkd.evaluate.statistics import Replicates, holm, paired_difference, resampled, signed_rank_p


def replicates(y: np.ndarray, score: np.ndarray, seed: int = 0, n: int = 1000) -> Replicates:
    """Accuracy with plain row resamples."""
    counts = np.concatenate(list(group_counts(np.arange(len(y)), n, seed)))
    whole = metrics.accuracy(y, score, np.ones((1, len(y))))
    return Replicates(float(whole[0]), metrics.accuracy(y, score, counts), len(y), len(y), 0)


def two_models_on_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Test labels; scores of nearest class means (K2) and of logistic regression at C=1 (K4b)."""
    x, y = load_digits(return_X_y=True)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    means = np.stack([x[:898][y[:898] == label].mean(axis=0) for label in range(10)])
    nearest = x[898:] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    return y[898:], nearest, LogisticRegression(C=1, max_iter=1000).fit(x[:898], y[:898]).predict_proba(x[898:])


def test_paired_difference_is_tighter_and_agrees_with_mcnemar() -> None:
    y, nearest, probe = two_models_on_digits()
    right_nearest, right_probe = nearest.argmax(1) == y, probe.argmax(1) == y
    assert (int((right_probe & ~right_nearest).sum()), int((~right_probe & right_nearest).sum())) == (33, 4)
    assert binomtest(4, 33 + 4).pvalue == pytest.approx(1.084e-06, rel=1e-3)  # McNemar's exact test
    paired = paired_difference(replicates(y, probe), replicates(y, nearest), 0.95)
    assert paired.value == pytest.approx(29 / 899)
    assert (paired.low, paired.high) == pytest.approx((0.0189, 0.0456), abs=0.003)
    assert paired.verdict() == "win"
    assert paired.verdict(lower_is_better=True) == "loss"
    assert paired.p == pytest.approx(2 / 1001)
    unpaired = paired_difference(replicates(y, probe, seed=1), replicates(y, nearest, seed=2), 0.95)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2


def test_identical_models_do_not_differ() -> None:
    y, nearest, _ = two_models_on_digits()
    same = paired_difference(replicates(y, nearest), replicates(y, nearest), 0.95)
    assert (same.value, same.low, same.high, same.p, same.verdict()) == (0.0, 0.0, 0.0, 1.0, "tie")


def test_documented_wilcoxon() -> None:
    differences = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
    assert signed_rank_p(differences) == pytest.approx(0.041259765625, abs=1e-12)
    assert signed_rank_p([*differences, math.nan]) == signed_rank_p(differences)
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert math.isnan(signed_rank_p([]))
    assert signed_rank_p([1, 2, 3, 4, 5]) == 0.0625
    assert signed_rank_p([1, 2, 3, 4, 5, 6]) == 0.03125


@pytest.mark.integration
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_wilcoxon_with_ties_and_zeros_counts_all_signs(differences: list[int]) -> None:
    there = np.array([one for one in differences if one], dtype=float)
    if not len(there):
        assert signed_rank_p(differences) == 1.0
        return
    ranks = rankdata(np.abs(there))
    sums = [sum(r for r, up in zip(ranks, signs, strict=True) if up) for signs in product((0, 1), repeat=len(there))]
    found = ranks[there > 0].sum()
    tails = np.mean(np.array(sums) <= found), np.mean(np.array(sums) >= found)
    assert signed_rank_p(differences) == pytest.approx(min(1.0, 2 * min(tails)), abs=1e-12)
    assert signed_rank_p(differences) == pytest.approx(wilcoxon(differences).pvalue, abs=1e-12)


def test_wilcoxon_of_many_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (14, 30, 50, 51, 80):
        differences = rng.normal(0.3, 1, n)
        assert signed_rank_p(differences.tolist()) == pytest.approx(wilcoxon(differences).pvalue, rel=1e-12)


def test_documented_false_discovery_control() -> None:
    # K14 pins the library that a later choice between Holm and Benjamini-Hochberg would use.
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
         0.7590, 1.000]  # fmt: skip
    assert false_discovery_control(p)[:6] == pytest.approx([0.0015, 0.003, 0.0095, 0.035625, 0.0603, 0.06385714])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == 0.02


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_never_below_p_nor_above_bonferroni(p: list[float]) -> None:
    for raw, adjusted in zip(p, holm(p), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p)) + 1e-12


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 2**31))
def test_whole_groups_are_resampled(groups: list[int], seed: int) -> None:
    _, member = np.unique(groups, return_inverse=True)
    counts = np.concatenate(list(group_counts(member, 7, seed)))
    assert counts.shape == (7, len(groups))
    for group in range(member.max() + 1):
        rows = counts[:, member == group]
        assert (rows == rows[:, :1]).all()
    # As many groups are drawn as there are.
    first = [int(np.flatnonzero(member == group)[0]) for group in range(member.max() + 1)]
    assert (counts[:, first].sum(axis=1) == len(first)).all()


def test_resamples_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    member = np.arange(50) // 2
    whole = np.concatenate(list(group_counts(member, 30, 3)))
    monkeypatch.setattr("mmkd.evaluate.scoring.BLOCK_ELEMENTS", 220)
    pieces = list(group_counts(member, 30, 3))
    assert len(pieces) == 8
    assert np.array_equal(np.concatenate(pieces), whole)


def answers(rank: np.ndarray, group: list[str], available: np.ndarray | None = None) -> Predictions:
    ids = np.array([f"q{i}" for i in range(len(rank))], dtype=object)
    there = np.ones(len(rank), dtype=bool) if available is None else available
    score = np.where(there, rank, np.nan).astype(float)[:, None]
    return Predictions(ids, np.array(group, dtype=object), ids, None, score, there, ("rank",))


HITS = Scoring("test", {"r@1": Metric(lambda p, w: recall_at(p.column("rank"), 1, w))}, primary="r@1")


def hit_rate(predictions: Predictions) -> Replicates:
    everything = {"all": np.ones(len(predictions), dtype=bool)}
    found = resampled(predictions, ["r@1"], HITS, bootstrap=BootstrapSettings(), name="x", parts=everything)
    return found["all", "r@1"]


def test_predictions_are_resampled_by_their_group() -> None:
    group = [f"p{i % 7}" for i in range(60)]
    for block in clustered_resamples(answers(np.zeros(60), group), BootstrapSettings(n=100), "x"):
        for i in range(7, 60):
            assert np.array_equal(block[:, i], block[:, i - 7])


def test_models_share_resamples_whatever_they_miss() -> None:
    group = [f"p{i // 3}" for i in range(60)]
    whole = answers(np.zeros(60), group)
    holes = answers(np.zeros(60), group, available=np.arange(60) % 7 != 0)
    settings = BootstrapSettings(n=100)
    for one, other in zip(
        clustered_resamples(whole, settings, "a/b/test"), clustered_resamples(holes, settings, "a/b/test"), strict=True
    ):
        assert np.array_equal(one, other)
    other_set = next(clustered_resamples(whole, settings, "a/c/test"))
    assert not np.array_equal(next(clustered_resamples(whole, settings, "a/b/test")), other_set)


def test_interval_of_a_query_bootstrap_holds_the_estimate() -> None:
    # K19: resampling the gallery as well makes duplicates tie with the truth, and the interval misses the estimate.
    rng = np.random.default_rng(0)
    rank = np.where(rng.random(400) < 0.637, 0, 5)
    found = hit_rate(answers(rank, [f"q{i}" for i in range(400)]))
    low, high = found.interval(0.95)
    assert low < found.value < high
    half_width = 1.96 * math.sqrt(found.value * (1 - found.value) / 400)
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.1)


def test_missing_rows_are_counted_and_never_scored() -> None:
    available = np.arange(10) % 2 == 0
    found = hit_rate(answers(np.zeros(10), list("abcdefghij"), available))
    assert (found.value, found.n, found.missing) == (1.0, 5, 5)


def test_an_interval_needs_a_value_in_half_of_the_resamples() -> None:
    draws = np.r_[np.full(60, np.nan), np.full(40, 0.5)]
    assert all(map(math.isnan, Replicates(0.5, draws, 10, 10, 0).interval(0.95)))
    assert Replicates(0.5, draws[30:], 10, 10, 0).interval(0.95) == (0.5, 0.5)


@pytest.mark.parametrize(("clustered", "low", "high"), [(True, 0.93, 0.97), (False, 0.0, 0.85)])
def test_intervals_cover(clustered: bool, low: float, high: float) -> None:
    """1000 simulated studies of 100 patients with 4 images each, whose errors go together."""
    rng = np.random.default_rng(11)
    member = np.repeat(np.arange(100), 4) if clustered else np.arange(400)
    counts = np.concatenate(list(group_counts(member, 400, 5)))
    truth, covered = 0.7, 0
    for _ in range(1000):
        patient = rng.random(100) < truth
        copied = rng.random((100, 4)) < 0.8
        right = np.where(copied, patient[:, None], rng.random((100, 4)) < truth).reshape(-1)
        draws = counts @ right / counts.sum(axis=1)
        found = Replicates(right.mean(), draws, 400, 100, 0).interval(0.95)
        covered += found[0] <= truth <= found[1]
    assert low <= covered / 1000 <= high


def coverage(n: int, kind: str) -> float:
    """Share of 3000 simulated studies of n samples whose 95 % interval holds the truth (0.8, or two unit normals)."""
    rng = np.random.default_rng(77)
    truth, covered, y = 0.8 if kind == "acc" else norm.cdf(math.sqrt(0.5)), 0, np.arange(n) % 2 == 1
    for study in range(3000):
        if study % 300 == 0:  # other resamples now and then: those of one seed have a luck of their own
            counts = np.concatenate(list(group_counts(np.arange(n), 400, 1000 + study)))
        if kind == "acc":
            right = (rng.random(n) < truth).astype(float)
            found = Replicates(right.mean(), counts @ right / n, n, n, 0)
        else:
            score = rng.normal(size=n) + y
            value = metrics.auroc(y, score, np.ones((1, n)))[0]
            found = Replicates(value, metrics.auroc(y, score, counts), n, n, 0)
        low, high = found.interval(0.95)
        covered += low <= truth <= high
    return covered / 3000


@pytest.mark.integration
@pytest.mark.parametrize(("n", "kind"), [(50, "acc"), (200, "acc"), (50, "auroc"), (200, "auroc")])
def test_intervals_cover_from_fifty_samples_on(n: int, kind: str) -> None:
    assert 0.93 <= coverage(n, kind) <= 0.97


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["acc", "auroc"])
def test_intervals_of_ten_samples_are_too_narrow_as_the_documentation_says(kind: str) -> None:
    assert 0.85 < coverage(10, kind) < 0.92
