"""Scoring: the metrics of a task's predictions, how they are resampled and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate import metrics
from mmkd.evaluate.metrics import Floats, Labels
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.resampling import BootstrapSettings, clustered_resamples

Metric = Callable[[Predictions, Floats], Floats]
"""Predictions of n available rows and counts (B, n) to values (B,); NaN where undefined."""
Contrast = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Rows on both sides of what a metric compares, such as positives and negatives, bool (n,) each."""


@dataclass(frozen=True)
class Scoring:
    """Metrics of a task's predictions, and how they are resampled and printed."""

    protocol: str
    metrics: dict[str, Metric]
    primary: str
    resamples: Callable[[Predictions, BootstrapSettings, str], Iterator[Floats]] = clustered_resamples
    lower_is_better: frozenset[str] = frozenset()
    not_shares: frozenset[str] = frozenset()
    """Metrics that tables print as they are; all others are shares of one, printed in percent."""
    proportions: frozenset[str] = frozenset()
    """Metrics that are a mean over samples; at 0 and 100 % their interval is Wilson's."""
    rows: Mapping[str, Callable[[Predictions], NDArray[np.bool_]]] = field(default_factory=dict)
    """For a metric of some of the rows: which, bool (n,)."""
    contrasts: Callable[[Predictions], Sequence[Contrast]] = lambda _: ()
    """Contrasts that every metric but `proportions` is a mean over: an interval needs groups on both sides of them."""
    own_contrasts: Mapping[str, Callable[[Predictions], Sequence[Contrast]]] = field(default_factory=dict)
    """Contrasts of single metrics, in place of these."""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """What a metric needs to have a value."""
    centered: frozenset[str] = frozenset()
    """Metrics that chance enlarges (distances, the largest of several): resamples, which add chance to chance, are
    moved so that their mean is the value."""


def class_contrasts(found: Predictions) -> list[Contrast]:
    """Each class that occurs against the rest; a single contrast of two classes."""
    labels = found.labels()
    masks = [labels == label for label in np.unique(labels)]
    return [(mask, ~mask) for mask in masks[: 1 if len(masks) == 2 else None]]


def _of_labels(metric: Callable[[Labels, Floats, Floats], Floats]) -> Metric:
    return lambda predictions, weights: metric(predictions.labels(), predictions.score, weights)


STANDARD = Scoring(
    "standard",
    {
        "acc": _of_labels(metrics.accuracy),
        "bacc": _of_labels(metrics.balanced_accuracy),
        "f1_macro": _of_labels(metrics.macro_f1),
        "auroc_macro": _of_labels(metrics.macro_auroc),
    },
    "auroc_macro",
    proportions=frozenset({"acc"}),
    contrasts=class_contrasts,
)
"""Scoring of single-label classification; a table never averages two of its metrics. `acc` is a mean over samples."""
