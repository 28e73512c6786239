"""Protocol `mmkd_official`: scores as the evaluation code released with MMKD-CLIP computes them, reimplemented from
github wangshansong1/MMKD-CLIP (MIT), `src/clipeval/eval_zeroshot.py`, quirks included: probabilities are a float32
softmax of bare cosines (temperature 1), which ties scores that nearly agree; F1, precision and recall of two classes
are those of class 1 alone; every resample holds one forced draw of each class and ignores patients. Where the released
code stops with an exception (a class is absent from the test set), values are undefined here."""

from collections.abc import Callable, Iterator

import numpy as np

from mmkd.base.arrays import Floats
from mmkd.evaluate import metrics
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import STANDARD, BootstrapSettings, Metric, Score, Scoring

TEMPERATURE = 1.0
SEED = 42
"""The released code always resamples with this seed; the suite's own seed is not used."""
BLOCK = 250


def forced_resamples(predictions: Predictions, settings: BootstrapSettings, name: str) -> Iterator[Floats]:
    """Yield counts, float64 (b, n), of resamples with one forced draw per class and N - C uniform ones, in the order of
    the released code: intervals agree to the last digit."""
    rows = np.flatnonzero(predictions.available)
    y = predictions.labels()[rows]
    members = [np.flatnonzero(y == label) for label in np.unique(y)]
    rng = np.random.default_rng(SEED)
    for start in range(0, settings.n, BLOCK):
        counts = np.zeros((min(BLOCK, settings.n - start), len(predictions)))
        for b in range(len(counts)):
            forced = [rng.choice(indices) for indices in members]
            drawn = [*forced, *rng.integers(0, len(y), size=len(y) - len(members))]
            counts[b, rows] = np.bincount(drawn, minlength=len(y))
        yield counts


def auroc(predictions: Predictions, weights: Floats) -> Floats:
    """Two classes: AUROC of the difference of scores; more: macro over all; undefined when a class is absent."""
    y, score = predictions.labels(), predictions.score
    occurring = np.unique(y)
    if len(occurring) == 2:
        difference = score[:, 1].astype(np.float32) - score[:, 0].astype(np.float32)
        return metrics.auroc(y == occurring[1], difference.astype(np.float64), weights)
    if len(occurring) < score.shape[1]:
        return np.full(len(weights), np.nan)
    return metrics.macro_auroc(y, score, weights)


def _over_classes(parts: Callable[[Floats, Floats, Floats], tuple[Floats, Floats]]) -> Score:
    """Average a ratio of counts (hits, predicted, actual) as scikit-learn's `average="binary"` (class 1 alone) with two
    classes and `"macro"` with more; 0 where a class has no denominator."""

    def metric(predictions: Predictions, weights: Floats) -> Floats:
        hits, predicted, actual = metrics.class_counts(predictions.labels(), predictions.score, weights)
        ratio = np.nan_to_num(metrics.ratio(*parts(hits, predicted, actual)))
        occurring = np.unique(predictions.labels()).tolist()
        if len(occurring) == 2:
            # The released call raises here if anything but classes 0 and 1 occurs or is predicted.
            seen = set(occurring) | set(predictions.score.argmax(axis=1).tolist())
            return ratio[:, 1] if seen == {0, 1} else np.full(len(ratio), np.nan)
        present = predicted + actual > 0
        return np.asarray(np.where(present, ratio, 0.0).sum(axis=1) / np.maximum(present.sum(axis=1), 1))

    return metric


f1 = _over_classes(lambda hits, predicted, actual: (2 * hits, predicted + actual))
precision = _over_classes(lambda hits, predicted, actual: (hits, predicted))
recall = _over_classes(lambda hits, predicted, actual: (hits, actual))

SCORING = Scoring(
    protocol="mmkd_official",
    metrics={
        "acc": STANDARD.metrics["acc"],
        "auroc_official": Metric(auroc),
        "f1_official": Metric(f1),
        "precision_official": Metric(precision),
        "recall_official": Metric(recall),
    },
    primary="auroc_official",
    resamples=forced_resamples,
)
