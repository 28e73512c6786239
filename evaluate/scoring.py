"""From stored predictions to a number with its interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.resampling import BootstrapSettings
from mmkd.evaluate.task import Metric, Scoring

FINITE_SHARE = 0.5
"""An interval needs at least this share of resamples with a value."""


@dataclass(frozen=True)
class Replicates:
    """A value and what it became in each resample.

    value: on the data themselves, NaN where undefined. draws: float64 (B,). n, groups: rows and groups behind it.
    missing: rows that were not scored, because the model has no features for them.
    """

    value: float
    draws: Floats
    n: int
    groups: int
    missing: int

    def interval(self, level: float) -> tuple[float, float]:
        """Percentile interval at `level`; NaN where the value, or half of the resamples, are undefined.

        Efron and Tibshirani 1993, section 13.3. The value reported is the point estimate, never the mean
        of the resamples.
        """
        finite = self.draws[np.isfinite(self.draws)]
        if np.isnan(self.value) or len(finite) < FINITE_SHARE * max(1, len(self.draws)):
            return float("nan"), float("nan")
        tail = 100 * (1 - level) / 2
        low, high = np.percentile(finite, [tail, 100 - tail])
        return float(low), float(high)


def resampled(
    predictions: Predictions,
    metrics: dict[str, Metric],
    scoring: Scoring,
    bootstrap: tuple[BootstrapSettings, str],
    parts: dict[str, NDArray[np.bool_]],
) -> dict[tuple[str, str], Replicates]:
    """Score the available rows of each part of a data set by several metrics, all on the same resamples.

    Resamples are drawn over all rows and then cut to those that count, so models, metrics and parts of a
    data set share them.

    Args:
        predictions: of all n rows.
        metrics: name to metric.
        scoring: where the resampler comes from.
        bootstrap: settings, and the name that seeds the draws.
        parts: name to bool (n,), the rows that belong to it.

    Returns:
        By (part, metric).
    """
    counted = {part: predictions.available & mask for part, mask in parts.items()}
    taken = {part: predictions.take(mask) for part, mask in counted.items()}
    draws: dict[tuple[str, str], list[Floats]] = {(part, name): [] for part in parts for name in metrics}
    for block in scoring.resamples(predictions, *bootstrap):
        for part, mask in counted.items():
            weights = block.T[mask].T
            for name, metric in metrics.items():
                draws[part, name].append(metric(taken[part], weights))
    found = {}
    for (part, name), blocks in draws.items():
        rows = taken[part]
        found[part, name] = Replicates(
            value=float(metrics[name](rows, np.ones((1, len(rows))))[0]),
            draws=np.concatenate(blocks),
            n=len(rows),
            groups=len(set(rows.group.tolist())),
            missing=int((parts[part] & ~predictions.available).sum()),
        )
    return found
