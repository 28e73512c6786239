"""Metrics of classification, and checks of labels against classes and prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmkd.base.errors import UserError
from mmkd.evaluate import metrics
from mmkd.evaluate.dataset import DatasetRows, Split
from mmkd.evaluate.metrics import Floats, Labels
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.task import Contrast, Metric, Scoring


def labelled(metric: Callable[[Labels, Floats, Floats], Floats]) -> Metric:
    """Return a metric of labels, scores and counts as one of predictions and counts."""

    def of_predictions(predictions: Predictions, weights: Floats) -> Floats:
        return metric(predictions.labels(), predictions.score, weights)

    return of_predictions


def standard_metrics() -> dict[str, Metric]:
    """Return the metrics of single-label classification; a table never averages two of them. `acc` is a mean over
    samples."""
    return {
        "acc": labelled(metrics.accuracy),
        "bacc": labelled(metrics.balanced_accuracy),
        "f1_macro": labelled(metrics.macro_f1),
        "auroc_macro": labelled(metrics.macro_auroc),
    }


def class_contrasts(found: Predictions) -> list[Contrast]:
    """Return each class that occurs against the rest; a single contrast of two classes."""
    labels = found.labels()
    masks = [labels == label for label in np.unique(labels)]
    return [(mask, ~mask) for mask in masks[: 1 if len(masks) == 2 else None]]


STANDARD = Scoring(
    "standard", standard_metrics(), "auroc_macro", proportions=frozenset({"acc"}), contrasts=class_contrasts
)


def class_problems(data: DatasetRows, splits: tuple[Split, ...], prompts: bool = False) -> list[str]:
    """Return splits without rows, labels that are not classes, classes without prompts or without samples."""
    found = []
    for split in splits:
        try:
            labels = data.labels(data.split(split))
        except UserError as error:
            found.append(str(error))
            continue
        bare = [data.classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(data.classes)) == 0)]
        if bare:
            found.append(f"{data.spec.dataset}: class {bare[0]!r} has no {split} rows ({len(bare)} such classes)")
    if prompts:
        try:
            data.prompt_labels()
        except UserError as error:
            found.append(str(error))
    return found
