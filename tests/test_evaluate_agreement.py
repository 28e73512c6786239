"""Metrics and independent implementations agree on random inputs: with ties, counts, gaps and absent classes.

MedMNIST's evaluator and CLIP_benchmark's metrics are restated here from their definitions; neither need be installed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pair_counts import count_pairs
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from mmkd.base.arrays import Floats
from mmkd.evaluate import metrics, official
from mmkd.evaluate.measures import Measures
from mmkd.evaluate.metrics import Labels, concordance, recall_at
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.retrieval import TIE, rank_positives
from mmkd.evaluate.scoring import BootstrapSettings
from mmkd.evaluate.statistics import resampled
from mmkd.evaluate.tasks import TASKS, TaskSettings

generators = st.integers(0, 2**31).map(np.random.default_rng)


def close(found: float, expected: float) -> bool:
    """Equal but for rounding; without a value on both sides or on neither."""
    return bool(np.isclose(found, expected, rtol=0, atol=1e-12, equal_nan=True))


def random_answers(rng: np.random.Generator) -> tuple[Labels, Floats]:
    """Labels and probabilities; half of the time with many ties, sometimes of one class only."""
    n, classes = int(rng.integers(1, 50)), int(rng.integers(2, 6))
    score = rng.integers(0, 4, (n, classes)) / 4 if rng.random() < 0.5 else rng.random((n, classes))
    return rng.integers(0, rng.integers(1, classes + 1), n), score + 1e-9 * (score.sum(axis=1, keepdims=True) == 0)


def answers_with_gaps(rng: np.random.Generator) -> Predictions:
    """Answers of which some are not available; at least one is."""
    y, score = random_answers(rng)
    there = rng.random(len(y)) < 0.7
    there[0] = True
    score[~there] = np.nan
    ids = np.array([f"s{i}" for i in range(len(y))], dtype=object)
    columns = tuple(f"c{i}" for i in range(score.shape[1]))
    return Predictions(ids, ids, ids, y.astype(np.int64), score, there, columns)


@pytest.mark.integration
@given(generators, st.booleans())
def test_any_weights_give_what_scikit_learn_gives_with_sample_weight(rng: np.random.Generator, whole: bool) -> None:
    y, score = random_answers(rng)
    weight = rng.integers(1, 5, len(y)).astype(float) if whole else rng.random(len(y)) + 0.1
    predicted, there = score.argmax(axis=1), np.unique(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recalls = balanced_accuracy_score(y, predicted, sample_weight=weight)
        f1 = f1_score(y, predicted, labels=there, average="macro", zero_division=0, sample_weight=weight)
    areas = [roc_auc_score(y == c, score[:, c], sample_weight=weight) for c in there if len(there) > 1]
    assert close(metrics.balanced_accuracy(y, score, weight[None])[0], recalls)
    assert close(metrics.macro_f1(y, score, weight[None])[0], f1)
    assert close(metrics.macro_auroc(y, score, weight[None])[0], float(np.mean(areas)) if areas else np.nan)


@pytest.mark.integration
@given(generators)
def test_samples_without_features_are_scored_as_if_they_were_not_there(rng: np.random.Generator) -> None:
    found = answers_with_gaps(rng)
    scoring = TASKS["zero_shot"].scoring(SimpleNamespace(settings=TaskSettings(), measures=Measures()))
    every_row = {"": np.ones(len(found), dtype=bool)}
    by_metric = resampled(
        found, scoring.metrics, scoring, bootstrap=BootstrapSettings(n=100), name="x", parts=every_row
    )
    y, score = found.labels()[found.available], found.score[found.available]
    there, predicted = np.unique(y), score.argmax(axis=1)
    areas = [roc_auc_score(y == c, score[:, c]) for c in there if len(there) > 1]
    expected = {
        "acc": float((predicted == y).mean()),
        "bacc": float(np.mean([(predicted[y == c] == c).mean() for c in there])),
        "auroc_macro": float(np.mean(areas)) if areas else np.nan,
    }
    for name, value in expected.items():
        replicates = by_metric["", name]
        assert close(replicates.value, value), name
        assert (replicates.n, replicates.missing) == (len(y), len(found) - len(y))


@given(generators)
def test_the_official_protocol_is_scikit_learns_averages(rng: np.random.Generator) -> None:
    """The released code calls scikit-learn with `binary` for two classes and `macro` for more."""
    y, score = random_answers(rng)
    ids = np.array([f"s{i}" for i in range(len(y))], dtype=object)
    found = Predictions(ids, ids, ids, y, score, np.ones(len(y), bool), tuple(f"c{i}" for i in range(score.shape[1])))
    predicted = score.argmax(axis=1)
    if len(np.unique(y)) == 2 and not set(y.tolist()) | set(predicted.tolist()) <= {0, 1}:
        return  # there scikit-learn, and so the released code, may stop; tests/test_metrics.py has that case
    average = "binary" if len(np.unique(y)) == 2 else "macro"
    ours: dict[Callable[..., float], Floats] = {
        f1_score: official.f1(found, np.ones((1, len(y)))),
        precision_score: official.precision(found, np.ones((1, len(y)))),
        recall_score: official.recall(found, np.ones((1, len(y)))),
    }
    for theirs, value in ours.items():
        assert close(value[0], theirs(y, predicted, average=average, zero_division=0)), theirs.__name__


def medmnist_auc(y: Labels, score: Floats) -> float:
    """`getAUC` of MedMNIST's evaluator: the last column of two, else the mean of each class against the rest."""
    if score.shape[1] == 2:
        return float(roc_auc_score(y, score[:, -1]))
    return float(np.mean([roc_auc_score(y == c, score[:, c]) for c in range(score.shape[1])]))


def medmnist_acc(y: Labels, score: Floats) -> float:
    """`getACC` of MedMNIST's evaluator: above 0.5 for two classes, else the highest score."""
    predicted = score[:, -1] > 0.5 if score.shape[1] == 2 else score.argmax(axis=1)
    return float((predicted == y).mean())


@given(generators, st.integers(2, 5))
def test_k18_medmnists_evaluator(rng: np.random.Generator, classes: int) -> None:
    y = np.r_[np.arange(classes), rng.integers(0, classes, 30)]
    score = rng.integers(1, 6, (len(y), classes)).astype(float)
    score /= score.sum(axis=1, keepdims=True)
    ones = np.ones((1, len(y)))
    assert close(metrics.macro_auroc(y, score, ones)[0], medmnist_auc(y, score))
    assert close(metrics.accuracy(y, score, ones)[0], medmnist_acc(y, score))


def clip_benchmark_recall(scores: Floats, positive: np.ndarray, k: int) -> float:
    """Share of queries with a positive among the k highest scores, as CLIP_benchmark's retrieval metric counts."""
    top = np.argsort(-scores, axis=1)[:, :k]
    return float((np.take_along_axis(positive, top, axis=1).sum(axis=1) > 0).mean())


@given(generators)
def test_retrieval_is_clip_benchmarks_both_ways(rng: np.random.Generator) -> None:
    """Several captions per image. Cosines within `TIE` of each other are left out: that code lets the sort decide."""
    images, texts = int(rng.integers(2, 8)), int(rng.integers(8, 25))
    of_text = np.r_[np.arange(images), rng.integers(0, images, texts - images)]
    image, text = (rng.normal(size=(n, 16)).astype(np.float32) for n in (images, texts))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    positive = of_text[:, None] == np.arange(images)
    to_image = rank_positives(text, image, [np.array([i]) for i in of_text], (1,))
    to_text = rank_positives(image, text, [np.flatnonzero(of_text == i) for i in range(images)], (1,))
    scores = (text @ image.T).astype(float)
    for side in (scores, scores.T):
        assume(np.diff(np.sort(side, axis=1), axis=1).min() > 2 * TIE)
    for k in range(1, images + 1):
        assert close(recall_at(to_image[:, 0], k, np.ones((1, texts)))[0], clip_benchmark_recall(scores, positive, k))
        assert close(
            recall_at(to_text[:, 0], k, np.ones((1, images)))[0], clip_benchmark_recall(scores.T, positive.T, k)
        )


@given(generators)
def test_zero_shot_is_clip_benchmarks(rng: np.random.Generator) -> None:
    """Its acc1 is the share of right first places, its mean per class recall scikit-learn's balanced accuracy."""
    y, score = rng.integers(0, 4, 40), rng.random((40, 4))
    ones = np.ones((1, 40))
    first = np.argsort(-score, axis=1)[:, 0]
    assert close(metrics.accuracy(y, score, ones)[0], float((first == y).mean()))
    assert close(metrics.balanced_accuracy(y, score, ones)[0], balanced_accuracy_score(y, first))


def test_concordance_is_scikit_survivals() -> None:
    sksurv = pytest.importorskip("sksurv.metrics", reason="scikit-survival (GPL) is not installed")

    @given(generators)
    def agree(rng: np.random.Generator) -> None:
        n = int(rng.integers(3, 40))
        risk, time = rng.integers(0, 6, n).astype(float), rng.integers(1, 9, n).astype(float)
        event = rng.random(n) < 0.6
        counts = count_pairs(risk, time, event)
        try:
            with warnings.catch_warnings():  # it divides by zero where times are tied and nothing can be compared
                warnings.simplefilter("ignore")
                theirs = sksurv.concordance_index_censored(event, time, risk)
        except ValueError as error:  # all censored, or no pair that can be compared
            assert np.isnan(counts.index), error  # noqa: PT017 - it raises for several reasons
            return
        assert (counts.concordant, counts.discordant, counts.tied_risk) == theirs[1:4]
        assert close(concordance(risk, time, event, np.ones((1, n)))[0], theirs[0])

    agree()


def test_k7_k8_fitted_cox_models_of_scikit_survival() -> None:
    """Documented concordances of full Cox models, scored by our count of pairs."""
    datasets = pytest.importorskip("sksurv.datasets", reason="scikit-survival (GPL) is not installed")
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.preprocessing import OneHotEncoder

    x, y = datasets.load_veterans_lung_cancer()
    x = OneHotEncoder().fit_transform(x)
    counts = count_pairs(CoxPHSurvivalAnalysis().fit(x, y).predict(x), y["Survival_in_days"], y["Status"])
    assert counts.index == pytest.approx(0.7362562471603816, abs=1e-9)
    assert (counts.concordant, counts.discordant, counts.tied_risk) == (6482, 2322, 0)
    x, y = datasets.load_whas500()
    x = x.astype(float)
    risk = CoxPHSurvivalAnalysis().fit(x, y).predict(x)
    assert count_pairs(risk, y["lenfol"].astype(float), y["fstat"]).index == pytest.approx(0.7842153588, abs=1e-6)
    x, y = datasets.load_gbsg2()
    nodes = count_pairs(x["pnodes"].to_numpy(float), y["time"].astype(float), y["cens"])
    assert nodes.index == pytest.approx(0.6452446795719611, abs=1e-12)


@pytest.mark.parametrize("number", [f"K{i}" for i in range(1, 21)])
def test_the_list_of_known_answers_names_tests_that_exist(number: str) -> None:
    root = Path(__file__).resolve().parents[1]
    (row,) = re.findall(rf"^\| {number} \|.*$", (root / "docs" / "evaluation.md").read_text(), re.MULTILINE)
    named = re.findall(r"`(test_\w+)::(test_\w+)`", row)
    assert named, row
    for file, name in named:
        assert f"def {name}(" in (root / "tests" / f"{file}.py").read_text(), f"{file}::{name}"
