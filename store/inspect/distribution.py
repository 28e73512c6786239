"""A set of numbers as quantiles and a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 60


@dataclass(frozen=True)
class Distribution:
    """Summary of a set of numbers. All fields but `count` are NaN or empty when there are none."""

    count: int
    mean: float
    minimum: float
    q01: float
    """1 % of the numbers are smaller."""
    q25: float
    median: float
    q75: float
    q99: float
    maximum: float
    edges: tuple[float, ...]
    """Edges of the histogram's bins, `len(counts) + 1`."""
    counts: tuple[int, ...]


def distribution(values: NDArray[np.floating[Any]], span: tuple[float, float] | None = None) -> Distribution:
    """Summarize finite `values` (n,). `values`: any float type. `span`: ends of the histogram; smallest and largest
    value when None. Values outside count in the end bins."""
    numbers = values[np.isfinite(values)].astype(np.float64)
    if not len(numbers):
        nan = float("nan")
        return Distribution(0, nan, nan, nan, nan, nan, nan, nan, nan, (), ())
    low, high = span or (float(numbers.min()), float(numbers.max()))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1.0):
        # All (nearly) equal, as unit norms in float16 may be: a histogram needs some width.
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(np.clip(numbers, low, high), bins=BINS, range=(low, high))
    q01, q25, median, q75, q99 = np.quantile(numbers, (0.01, 0.25, 0.5, 0.75, 0.99)).tolist()
    return Distribution(
        count=len(numbers),
        mean=float(numbers.mean()),
        minimum=float(numbers.min()),
        q01=q01,
        q25=q25,
        median=median,
        q75=q75,
        q99=q99,
        maximum=float(numbers.max()),
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )
