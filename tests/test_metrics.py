"""Metrics against worked examples, scikit-learn, and the released MMKD-CLIP figures."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from mmkd.evaluate import metrics, official
from mmkd.evaluate.metrics import recall_at, weighted_median
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.retrieval import rank_positives, rank_scores
from mmkd.evaluate.scoring import BootstrapSettings
from mmkd.evaluate.statistics import resampled
from mmkd.evaluate.zero_shot import class_vectors

ONE = np.ones


def point(value: np.ndarray) -> float:
    assert value.shape == (1,)
    return float(value[0])


def predictions_of(y: np.ndarray, score: np.ndarray) -> Predictions:
    n = len(y)
    ids = np.array([str(i) for i in range(n)], dtype=object)
    columns = tuple(str(i) for i in range(score.shape[1]))
    return Predictions(ids, ids, ids, y.astype(np.int64), score, ONE(n, dtype=bool), columns)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unit rows of scikit-learn's digits, the first 898 for training: x_train, y_train, x_test, y_test."""
    x, y = load_digits(return_X_y=True)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x[:898], y[:898], x[898:], y[898:]


def digit_cosines() -> tuple[np.ndarray, np.ndarray]:
    """K2: mean vectors of the training classes stand in for class texts."""
    x_train, y_train, x_test, y_test = digits()
    vectors = class_vectors(x_train.astype(np.float32), y_train, 10).astype(np.float64)
    return x_test @ vectors.T, y_test


# --- retrieval: K1, K1b, K1c

TEXTS_BY_IMAGES = np.array([[0.9, 0.2, 0.1], [0.3, 0.4, 0.5], [0.6, 0.7, 0.1], [0.2, 0.8, 0.3], [0.5, 0.5, 0.4]])
IMAGE_OF_TEXT = np.array([0, 0, 1, 1, 2])


def ranks_of(scores: np.ndarray, positives: list[np.ndarray], ks: tuple[int, ...] = (1, 2, 3)) -> np.ndarray:
    return rank_scores(scores, positives, ks)


def test_recall_of_a_worked_matrix() -> None:
    ones = ONE((1, 5))
    to_image = ranks_of(TEXTS_BY_IMAGES, [np.array([image]) for image in IMAGE_OF_TEXT])
    assert to_image[:, 0].tolist() == [0, 2, 0, 0, 2]
    assert [point(recall_at(to_image[:, 0], k, ones)) for k in (1, 2, 3)] == pytest.approx([0.6, 0.6, 1.0])
    to_text = ranks_of(TEXTS_BY_IMAGES.T, [np.flatnonzero(image == IMAGE_OF_TEXT) for image in range(3)])
    assert to_text[:, 0].tolist() == [0, 0, 1]
    assert [point(recall_at(to_text[:, 0], k, ONE((1, 3)))) for k in (1, 2)] == pytest.approx([2 / 3, 1.0])
    # True recall (share of all positives found) is another number than "at least one found".
    assert to_text[:, 2:].mean(axis=0)[:2].tolist() == pytest.approx([1 / 3, 5 / 6])


def test_one_score_for_all_finds_nothing() -> None:
    ranks = ranks_of(np.full((4, 4), 0.5), [np.array([i]) for i in range(4)])
    assert point(recall_at(ranks[:, 0], 1, ONE((1, 4)))) == 0.0
    assert (ranks[:, 1] > 0).mean() == 1.0


def test_duplicate_captions_are_all_right() -> None:
    images = np.eye(3, dtype=np.float32)
    texts = np.eye(3, dtype=np.float32)[[0, 0, 2]]  # row 1 has the caption of row 0
    merged = rank_positives(images[[0, 2]], texts[[0, 2]], [np.array([0]), np.array([1])], (1,))
    assert point(recall_at(merged[:, 0], 1, ONE((1, 2)))) == 1.0
    by_pair = rank_positives(images, texts, [np.array([i]) for i in range(3)], (1,))
    assert point(recall_at(by_pair[:, 0], 1, ONE((1, 3)))) < 1.0


def test_equal_vectors_tie_wherever_they_stand_in_a_large_gallery() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(4099, 512)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    gallery[4098] = gallery[7]
    found = rank_positives(gallery[[7, 7]], gallery, [np.array([7]), np.array([4098])], (1,))
    assert found[:, 0].tolist() == [1.0, 1.0]
    assert found[:, 1].tolist() == [1.0, 1.0]


def test_a_rounding_error_does_not_break_a_tie() -> None:
    ranks = ranks_of(np.array([[0.5 + 3e-8, 0.5, 0.4], [0.5, 0.5 - 2e-6, 0.4]]), [np.array([0]), np.array([0])])
    assert ranks[:, 0].tolist() == [1, 0]
    assert ranks[:, 1].tolist() == [1, 0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_ranks_agree_with_a_sort(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, size=(n, m)).astype(np.float64)
    positives = [np.flatnonzero(rng.random(m) < 0.3) for _ in range(n)]
    ranks = ranks_of(scores, positives, (1, 3))
    for i, right in enumerate(positives):
        if len(right) == 0:
            assert np.isnan(ranks[i, 0])
            continue
        wrong_first = sorted(range(m), key=lambda j: (-scores[i, j], j in right))
        places = [wrong_first.index(j) for j in right]
        assert ranks[i, 0] == min(places)
        assert ranks[i, 2:].tolist() == [sum(p < k for p in places) / len(right) for k in (1, 3)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 2**31))
def test_weighted_median_is_that_of_repeated_rows(values: list[int], seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 3, size=len(values))
    counts[0] += 1
    expected = np.median(np.repeat(values, counts))
    assert point(weighted_median(np.array(values, dtype=float), counts[None].astype(float))) == expected


# --- classification: K2, K5, K6, K16, K18


def test_zero_shot_on_digits() -> None:
    cosines, y = digit_cosines()
    ones = ONE((1, len(y)))
    hits = int((softmax(cosines * 100, axis=1).argmax(axis=1) == y).sum())
    assert hits == 786
    assert point(metrics.accuracy(y, cosines, ones)) == pytest.approx(0.874305, abs=1e-6)
    assert point(metrics.balanced_accuracy(y, cosines, ones)) == pytest.approx(0.874301, abs=1e-6)
    assert point(metrics.macro_f1(y, cosines, ones)) == pytest.approx(0.874611, abs=1e-6)
    by_scale = {1: 0.977780, 100: 0.986336}
    for scale, expected in by_scale.items():
        score = softmax(cosines * scale, axis=1)
        assert point(metrics.macro_auroc(y, score, ones)) == pytest.approx(expected, abs=2e-6)
    assert point(metrics.macro_auroc(y, cosines, ones)) == pytest.approx(0.949182, abs=2e-6)


def test_documented_examples_of_scikit_learn() -> None:
    y, predicted = np.array([0, 1, 0, 0, 1, 0]), np.array([0, 1, 0, 0, 0, 1])
    assert point(metrics.balanced_accuracy(y, np.eye(2)[predicted], ONE((1, 6)))) == 0.625
    score = np.array([0.1, 0.4, 0.35, 0.8])
    assert point(metrics.auroc(np.array([False, False, True, True]), score, ONE((1, 4)))) == 0.75
    y, predicted = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1])
    assert point(metrics.macro_f1(y, np.eye(3)[predicted], ONE((1, 6)))) == pytest.approx(0.26667, abs=1e-5)


def test_absent_class_is_left_out() -> None:
    y = np.array([0, 1, 0, 1])
    score = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.6, 0.3, 0.1], [0.3, 0.5, 0.2]])
    assert point(metrics.macro_auroc(y, score, ONE((1, 4)))) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(roc_auc_score(y, score, multi_class="ovr", labels=[0, 1, 2]))


def test_one_class_has_no_auroc() -> None:
    score = np.full((3, 2), 0.5)
    assert np.isnan(point(metrics.macro_auroc(np.zeros(3, dtype=np.int64), score, ONE((1, 3)))))


def test_nothing_has_no_value() -> None:
    nothing = np.empty(0, dtype=np.int64), np.empty((0, 2)), np.empty((1, 0))
    for metric in (metrics.accuracy, metrics.balanced_accuracy, metrics.macro_f1, metrics.macro_auroc):
        assert np.isnan(point(metric(*nothing)))


@pytest.mark.integration
@given(st.integers(2, 60), st.integers(2, 5), st.booleans(), st.integers(0, 2**31))
def test_metrics_agree_with_scikit_learn_on_counts(n: int, classes: int, tied: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, size=n)
    score = rng.integers(0, 4, size=(n, classes)) / 4 if tied else rng.random((n, classes))
    counts = rng.integers(0, 4, size=(3, n)).astype(np.float64)
    counts[:, 0] += 1
    found = {
        "acc": metrics.accuracy(y, score, counts),
        "bacc": metrics.balanced_accuracy(y, score, counts),
        "f1": metrics.macro_f1(y, score, counts),
        "auroc": metrics.macro_auroc(y, score, counts),
    }
    predicted = score.argmax(axis=1)
    for b, weight in enumerate(counts):
        rows = np.repeat(np.arange(n), weight.astype(int))
        there = np.unique(y[rows])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert found["bacc"][b] == pytest.approx(balanced_accuracy_score(y[rows], predicted[rows]), abs=1e-12)
            expected = f1_score(y[rows], predicted[rows], labels=there, average="macro", zero_division=0)
        assert found["f1"][b] == pytest.approx(expected, abs=1e-12)
        assert found["acc"][b] == pytest.approx(accuracy_score(y, predicted, sample_weight=weight), abs=1e-12)
        # K18: MedMNIST's evaluator takes the unweighted mean of each class against the rest.
        areas = [roc_auc_score(y == c, score[:, c], sample_weight=weight) for c in there if len(there) > 1]
        assert (np.isnan(found["auroc"][b]) and not areas) or found["auroc"][b] == pytest.approx(
            np.mean(areas), abs=1e-12
        )


# --- official protocol: K3, K3b


def official_scores(y: np.ndarray, cosines: np.ndarray, n: int = 1000) -> dict[str, list[float]]:
    found = resampled(
        predictions_of(y, softmax(cosines, axis=1)),
        official.SCORING.metrics,
        official.SCORING,
        bootstrap=BootstrapSettings(n=n),
        name="unused",
        parts={"all": ONE(len(y), dtype=bool)},
    )
    return {name: [100 * one.value, *(100 * limit for limit in one.interval(0.95))] for (_, name), one in found.items()}


def test_released_metric_code_on_ten_classes() -> None:
    cosines, y = digit_cosines()
    found = official_scores(y, cosines)
    assert found["acc"] == pytest.approx([87.4305, 85.317, 89.4355], abs=1e-3)
    assert found["auroc_official"] == pytest.approx([97.778, 97.269, 98.2138], abs=1e-3)
    assert found["f1_official"][0] == pytest.approx(87.4611, abs=1e-3)
    assert found["precision_official"][0] == pytest.approx(88.1442, abs=1e-3)
    assert found["recall_official"][0] == pytest.approx(87.4301, abs=1e-3)


def test_released_metric_code_on_two_classes() -> None:
    x, y = load_digits(return_X_y=True)
    x, y = x[np.isin(y, (3, 8))], y[np.isin(y, (3, 8))]
    x, y = x / np.linalg.norm(x, axis=1, keepdims=True), (y == 8).astype(np.int64)
    half = len(y) // 2
    vectors = class_vectors(x[:half].astype(np.float32), y[:half], 2)
    assert (len(y) - half, int(y[half:].sum())) == (179, 88)
    found = {name: one[0] for name, one in official_scores(y[half:], x[half:] @ vectors.T, n=100).items()}
    assert found == pytest.approx(
        {
            "acc": 91.0615,
            "auroc_official": 97.8022,
            "f1_official": 91.3978,
            "precision_official": 86.7347,
            "recall_official": 96.5909,
        },
        abs=1e-3,
    )


def test_forced_draws_inflate_rare_classes() -> None:
    y = np.r_[np.ones(11, dtype=np.int64), np.zeros(189, dtype=np.int64)]
    made = predictions_of(y, np.zeros((200, 2)))
    blocks = np.concatenate(list(official.forced_resamples(made, BootstrapSettings(n=4000), "")))
    assert (blocks.sum(axis=1) == 200).all()
    assert blocks[:, :11].sum(axis=1).mean() == pytest.approx(11 * 198 / 200 + 1, abs=0.15)


def test_official_values_are_undefined_where_the_released_code_stops() -> None:
    score = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    two_of_three = predictions_of(np.array([0, 1, 0, 1]), score)
    assert np.isnan(point(official.f1(two_of_three, ONE((1, 4)))))
    one_of_three = predictions_of(np.zeros(4, dtype=np.int64), score)
    assert np.isnan(point(official.auroc(one_of_three, ONE((1, 4)))))


# --- reference classifiers: K4, K4b. They pin scikit-learn's, on which the probe stands.


@pytest.mark.parametrize(("c", "correct", "area"), [(0.316, 835, 0.994205), (1.0, 840, 0.995172)])
def test_logistic_regression_on_digits(c: float, correct: int, area: float) -> None:
    x, y = load_digits(return_X_y=True)
    model = LogisticRegression(C=c, max_iter=1000).fit(x[:898] / 16, y[:898])
    proba = model.predict_proba(x[898:] / 16)
    assert abs(int((proba.argmax(axis=1) == y[898:]).sum()) - correct) <= 2
    assert point(metrics.macro_auroc(y[898:], proba, ONE((1, 899)))) == pytest.approx(area, abs=1e-4)


def test_documented_iris_and_breast_cancer() -> None:
    x, y = load_iris(return_X_y=True)
    proba = LogisticRegression(max_iter=1000).fit(x, y).predict_proba(x)
    assert point(metrics.accuracy(y, proba, ONE((1, 150)))) == 146 / 150
    x, y = load_breast_cancer(return_X_y=True)
    proba = LogisticRegression(solver="liblinear", random_state=0).fit(x, y).predict_proba(x)
    assert point(metrics.macro_auroc(y, proba, ONE((1, len(y))))) == pytest.approx(0.994675, abs=1e-4)
