"""Class or hospital: the measures against their definitions, planted confounders, intervals, pages and bad input."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats.contingency import association
from sklearn.metrics import adjusted_rand_score, balanced_accuracy_score
from trust_scene import hospitals

from mmkd.base.errors import MmkdError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite, neighbors, robustness, trust_measures
from mmkd.evaluate.metrics import balanced_accuracy
from mmkd.evaluate.neighbors import nearest_rows, shares_of_votes
from mmkd.evaluate.robustness import TrustSettings
from mmkd.evaluate.scoring import group_counts
from mmkd.evaluate.trust import MEASURES, TrustReport, measure_trust

QUICK = TrustSettings(combinations=1, clusters=(2, 4), repeats=2, silhouette_inits=1, inits=1)


def plain_neighbors(x: np.ndarray, group: np.ndarray, i: int) -> list[int]:
    """Rows of other groups, the highest cosine first, then the first row."""
    others = [j for j in range(len(x)) if group[j] != group[i]]
    return sorted(others, key=lambda j: (-float(x[i] @ x[j]), j))


def plain_index(x: np.ndarray, biology: np.ndarray, site: np.ndarray, group: np.ndarray, k: int) -> float:
    """The published definition, one pair at a time: the same class elsewhere over that and another class here."""
    same_other = other_same = 0
    for i in range(len(x)):
        for j in plain_neighbors(x, group, i)[:k]:
            same_other += biology[i] == biology[j] and site[i] != site[j]
            other_same += biology[i] != biology[j] and site[i] == site[j]
    return same_other / (same_other + other_same) if same_other + other_same else math.nan


def others_of(read: Callable[[np.ndarray], np.ndarray], group: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of other groups of every row, and cosines."""
    n = len(group)
    return nearest_rows(read(np.arange(n)), neighbors.blocks_of(read, n), k, group, group)


def lattice(rng: np.random.Generator, n: int) -> np.ndarray:
    """Unit vectors whose products have no rounding, and many ties: float32 (n, 4)."""
    return rng.choice([-0.5, 0.5], size=(n, 4)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 40), st.integers(1, 12), st.integers(1, 9))
def test_the_index_is_its_published_definition(seed: int, n: int, k: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    x, group = lattice(rng, n), rng.integers(0, 5, n)
    biology, site = rng.integers(0, 3, n), rng.integers(0, 3, n)
    group[:2] = 0, 1
    k = min(k, *(int((group != one).sum()) for one in group))
    with patch.object(neighbors, "BLOCK", block), patch.object(neighbors, "QUERIES", 3):
        where, cosine = others_of(x.__getitem__, group, k)
    assert where.tolist() == [plain_neighbors(x, group, i)[:k] for i in range(n)]
    assert np.array_equal(cosine, np.take_along_axis(x @ x.T, where, axis=1))
    pairs = robustness.group_pairs(biology, site, np.arange(n), where, group)
    assert robustness.robustness_index(pairs) == pytest.approx(
        plain_index(x, biology, site, group, k), abs=1e-12, nan_ok=True
    )


def test_fewer_neighbors_than_asked_are_minus_one() -> None:
    where, cosine = others_of(np.eye(3, dtype=np.float32).__getitem__, np.array([0, 0, 1]), 2)
    assert where.tolist() == [[2, -1], [2, -1], [0, 1]]
    assert cosine[0].tolist() == [0, -np.inf]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_votes_give_the_balanced_accuracy_of_the_most_frequent_first_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, where = np.concatenate([np.arange(4), rng.integers(0, 4, 26)]), rng.integers(0, 30, (30, 9))
    for k, votes in zip((1, 5, 9), shares_of_votes(y, where, [1, 5, 9], 4), strict=True):
        predicted = [np.bincount(y[row[:k]], minlength=4).argmax() for row in where]
        assert balanced_accuracy(y, votes, np.ones((1, 30)))[0] == pytest.approx(balanced_accuracy_score(y, predicted))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_influence_is_the_derivative_of_the_index_by_how_often_a_group_occurs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, groups = 40, 8
    group = np.concatenate([np.arange(groups), rng.integers(0, groups, n - groups)])
    codes = [rng.integers(0, 2, n) for _ in range(2)]
    where, _ = others_of(lattice(np.random.default_rng(seed), n).__getitem__, group, 6)
    pairs = [one.toarray() for one in robustness.group_pairs(*codes, np.arange(n), where, group)]

    def weighted(counts: np.ndarray) -> float:
        same, other = (counts @ one @ counts for one in pairs)
        return float(same / (same + other))

    bumped = np.eye(groups) * 1e-6
    slopes = np.array([(weighted(1 + one) - weighted(1 - one)) / 2e-6 for one in bumped])
    found = robustness.index_influence(robustness.group_pairs(*codes, np.arange(n), where, group))
    assert np.linalg.norm(found) > 0
    assert found / np.linalg.norm(found) == pytest.approx(slopes / np.linalg.norm(slopes), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_rand_index_is_scikit_learns_and_in_resamples_that_of_different_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 3, 20), rng.integers(0, 4, 20)
    counts = rng.integers(0, 3, 20).astype(float)
    found = robustness.rand_index(one, other, np.stack([np.ones(20), counts]))
    assert found[0] == pytest.approx(adjusted_rand_score(one, other), abs=1e-12)
    pairs = [
        (counts[i] * counts[j], one[i] == one[j], other[i] == other[j]) for i, j in itertools.combinations(range(20), 2)
    ]
    total, first, second, both = (
        sum(w for w, a, b in pairs if keep(a, b))
        for keep in (lambda a, b: True, lambda a, b: a, lambda a, b: b, lambda a, b: a and b)
    )
    expected = first * second / total
    assert found[1] == pytest.approx((both - expected) / ((first + second) / 2 - expected), abs=1e-12)


def test_chance_index_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    biology, site = rng.integers(0, 3, 60), rng.choice(4, 60, p=[0.5, 0.3, 0.1, 0.1])
    same_class, same_site = (code[:, None] == code for code in (biology, site))
    favorable, adverse = (same_class & ~same_site).sum(), (~same_class & same_site).sum()
    assert robustness.chance_index(biology, site) == pytest.approx(favorable / (favorable + adverse))


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_training_rows_have_the_correlation_of_their_level_and_one_number(level: float) -> None:
    cell = np.repeat(np.arange(4), (40, 44, 60, 80))
    order = robustness._by_group(cell, np.arange(len(cell)) // 2, np.ones(len(cell), dtype=bool), seed=0)
    for _, rows in robustness._training_rows(order, (level,)):
        table = np.bincount(cell[rows], minlength=4).reshape(2, 2)
        assert association(table, method="cramer") == pytest.approx(level)
        assert len(rows) == len(set(rows.tolist())) == 80


def test_performance_drop_is_relative_to_no_correlation() -> None:
    scores = np.array([[0.8, 0.5], [0.6, 0.5], [0.4, 0.25]])
    assert robustness.performance_drop(scores) == pytest.approx([(0.75 + 0.5) / 2 - 1, (1 + 0.5) / 2 - 1])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TrustReport:
    strengths = {"biology": (1.5, 0.0), "both": (1.0, 1.0), "site": (0.0, 1.5)}
    suite = load_suite(hospitals(tmp_path_factory.mktemp("trust"), strengths))
    (found,) = measure_trust(suite, "tissue", "hospital", QUICK.model_copy(update={"k": 11}))
    return found


def test_planted_confounders_are_recovered(report: TrustReport) -> None:
    biology, both, site = ({name: one.value for name, one in model.measures.items()} for model in report.models)
    assert biology["robustness_index"] > 0.95
    assert site["robustness_index"] < 0.05
    assert biology["robustness_index"] > both["robustness_index"] > site["robustness_index"]
    for name, most in (("knn_confounder", 0.55), ("linear_confounder", 0.6), ("linear_confounder_auroc", 0.75)):
        assert biology[name] < most
        assert site[name] > 0.99
    assert biology["clustering_score"] > 0.7
    assert site["clustering_score"] < 0
    assert biology["accuracy_correlated"] > both["accuracy_correlated"] - 0.05 > site["accuracy_correlated"]
    assert biology["performance_drop"] > both["performance_drop"] - 0.01


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_a_stronger_confounder_lowers_the_index(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    strengths = {f"s{i}": (1.0, site) for i, site in enumerate((0.0, 0.7, 1.4, 2.8))}
    suite = hospitals(tmp_path_factory.mktemp("rising"), strengths, patients=12, seed=seed, each=4, classes=2)
    with patch("mmkd.evaluate.trust_measures.robustness.linear_scores", lambda x, y, *_: np.full((len(y), 3), 0.1)):
        (found,) = measure_trust(load_suite(suite), "tissue", "hospital", QUICK.model_copy(update={"k": 21}))
    index = [one.measures["robustness_index"].value for one in found.models]
    assert index == sorted(index, reverse=True)
    assert index[0] > index[3] + 0.3


def test_intervals_hold_their_values(report: TrustReport) -> None:
    for model in report.models:
        for name, one in model.measures.items():
            low, high = report.interval(one)
            assert math.isnan(low) or low - 1e-12 <= one.value <= high + 1e-12, (model.model, name)


def test_differences_are_paired_and_adjusted(report: TrustReport) -> None:
    found = {(name, rival): (one, p) for name, rival, one, p in report.differences("biology")}
    one, p = found["robustness_index", "both"]
    own, other = (model.measures["robustness_index"] for model in report.models[:2])
    assert one.value == pytest.approx(own.value - other.value)
    assert one.verdict() == "win"
    assert one.low < one.value < one.high
    assert one.p <= p <= 2 * one.p
    extremes, _ = found["robustness_index", "site"]  # 1 and 0: no resample differs, and none can show more
    assert (extremes.value, extremes.verdict()) == (1, None)
    assert len(found) == 2 * len(MEASURES)


def test_the_file_says_what_was_measured(report: TrustReport) -> None:
    content = json.loads(report.as_json())
    assert (content["schema"], content["version"]) == ("mmkd.trust", 1)
    assert content["rows_of_class_at_site"] == [[48, 48, 48], [48, 48, 48]]
    cell = content["models"][1]["measures"]["robustness_index"]
    assert cell["low"] <= cell["value"] <= cell["high"]
    assert (cell["n"], cell["groups"], cell["reason"]) == (288, 48, "")
    assert content["chance_index"] == pytest.approx(2 / 3)


def run(suite: Path, *options: str) -> Any:
    return CliRunner().invoke(evaluate, ["trust", str(suite), "--jobs", "1", *options])


def test_command_writes_a_page_for_each_model(tmp_path: Path) -> None:
    suite = hospitals(tmp_path, {"alpha": (1, 0.5), "beta": (0.5, 1)}, patients=12, changes={3: {"tissue": None}})
    with patch("mmkd.evaluate.robustness.TrustSettings", lambda k: QUICK.model_copy(update={"k": k})):
        found = run(suite, "--biology", "tissue", "--confounder", "hospital", "--k", "5")
    assert found.exit_code == 0, found.output
    assert "1 row without tissue or of none of its classes left out" in found.output
    page = (tmp_path / "suite-results/trust/slides.alpha.html").read_text()
    assert "k = 5" in page
    assert "against" in page
    assert "4 groups in the smallest of its cells, expected 6 or more" in page
    assert not re.search(r"(src|href)=[\"']?(http|//)", page)
    assert {one.name for one in (tmp_path / "suite-results/trust").iterdir()} == {
        "slides.json", "slides.alpha.html", "slides.beta.html",
    }  # fmt: skip


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "one column twice": ({}, ("tissue", "tissue"), "biology and confounder are both 'tissue'; name two"),
    "no such column": ({}, ("tissue", "scanner"), "slides has no column 'scanner', only "),
    "one site": ({}, ("tissue", "constant"), "constant has only the value 'one'"),
    "the label again": ({}, ("tissue", "copy"), "copy is the same as tissue, so that"),
    "a site for each class": ({"sites": 12, "classes": 2}, ("hospital", "patient"), "hospital is decided by patient"),
    "k above the neighbors": ({"patients": 3}, ("tissue", "hospital", "--k", "500"), "k is 500, but there are"),
    "one patient": ({"group": "constant"}, ("tissue", "hospital"), "all rows are of one group"),
    "no rows": ({"rows": {"test": {"hospital": "nowhere"}}}, ("tissue", "hospital"), "slides has no test rows"),
    "no such set": ({}, ("tissue", "hospital", "--dataset", "other"), "no data set 'other'; the suite has slides"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path) -> None:
    scene, (biology, confounder, *options), expected = BAD[name]
    suite = hospitals(tmp_path, {"alpha": (1, 1)}, **({"patients": 24} | scene))
    found = run(suite, "--biology", biology, "--confounder", confounder, *options)
    assert isinstance(found.exception, MmkdError), found.output
    assert expected in str(found.exception)
    assert "\n" not in str(found.exception)
    assert not (tmp_path / "suite-results").exists()


def test_tiny_groups_have_values_without_intervals_and_reasons(tmp_path: Path) -> None:
    suite = hospitals(tmp_path, {"alpha": (1, 1)}, patients=4, each=2, sites=2)
    (found,) = measure_trust(load_suite(suite), "tissue", "hospital", QUICK.model_copy(update={"k": 5}))
    (alpha,) = found.models
    assert math.isfinite(alpha.measures["robustness_index"].value)
    assert math.isnan(found.interval(alpha.measures["robustness_index"])[0])
    assert "2 groups in the smallest" in alpha.measures["performance_drop"].reason


@pytest.mark.integration
def test_models_may_run_in_processes_of_their_own(tmp_path: Path) -> None:
    suite = load_suite(hospitals(tmp_path, {"alpha": (1, 0.5), "beta": (0.5, 1)}, patients=24))
    one, two = (measure_trust(suite, "tissue", "hospital", QUICK, jobs=jobs)[0] for jobs in (1, 2))
    assert one.as_json() == two.as_json()


@pytest.mark.integration
def test_intervals_of_the_index_hold_the_mean_of_studies() -> None:
    """200 studies of 40 patients at two sites, six rows of two classes each; ten designs are in docs/evaluation.md."""
    directions = np.random.default_rng(9).normal(size=(2, 16)) * 0.5
    values, limits = [], []
    for study in range(200):
        rng = np.random.default_rng(study)
        group = np.repeat(np.arange(40), 6)
        biology, site = np.tile([0, 1], 120), group % 2
        x = np.outer(biology, directions[0]) + np.outer(site, directions[1])
        x += 0.5 * rng.normal(size=(40, 16))[group] + 0.7 * rng.normal(size=x.shape)
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        where, _ = others_of(x.__getitem__, group, 11)
        pairs = robustness.group_pairs(biology, site, np.arange(240), where, group)
        values.append(robustness.robustness_index(pairs))
        (counts,) = group_counts(np.arange(40), 400, study)
        draws = values[-1] + (counts - 1) @ robustness.index_influence(pairs)
        limits.append(np.percentile(draws, [2.5, 97.5]))
    low, high = np.transpose(limits)
    assert 0.91 < np.mean((low <= np.mean(values)) & (np.mean(values) <= high)) < 0.99


def test_the_jackknife_is_the_same_a_few_groups_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    group, values = np.arange(90) % 30, rng.normal(size=90)
    asked: list[int] = []

    def score(counts: np.ndarray) -> np.ndarray:
        asked.append(len(counts))
        weights = counts[:, group]
        return (weights @ values) ** 2 / weights.sum(axis=1)

    counts = rng.poisson(1.0, size=(5, 30)).astype(np.float64)
    whole = trust_measures.jackknifed(score, np.arange(30))(counts)
    assert max(asked) == 30
    asked.clear()
    monkeypatch.setattr(trust_measures, "ELEMENTS", 4 * 30)
    assert trust_measures.jackknifed(score, np.arange(30))(counts) == pytest.approx(whole, rel=1e-12)
    assert max(asked) <= 4
