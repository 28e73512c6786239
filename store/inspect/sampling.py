"""Random rows and their features as unit vectors, which every statistic starts from, and summaries of numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.arrays import Bools, Ints, Singles
from mmkd.base.errors import UserError
from mmkd.store.reader import FeatureStore

BLOCK_ROWS = 4096
"""Rows brought to float32 at a time: 8 MB at width 512, so that memory stays flat however many rows are read."""
BINS = 60


def draw_rows(pool: Ints | int, count: int | None, seed: int) -> Ints:
    """Return `count` rows of `pool` (rows, or N for 0 to N - 1) by `seed` without replacement, all when None or when
    there are no more: int64 (min(count, N),), ascending. Raises UserError if `count` is not positive."""
    size = pool if isinstance(pool, int) else len(pool)
    if count is not None and count < 1:
        raise UserError(f"a sample of {count} rows says nothing; give 1 or more")
    if count is None or count >= size:
        picked = np.arange(size, dtype=np.int64)
    else:
        picked = np.sort(np.random.default_rng(seed).choice(size, count, replace=False, shuffle=False))
    return picked if isinstance(pool, int) else pool[picked]


def draw_inputs(store: FeatureStore, count: int | None, seed: int) -> Ints:
    """`draw_rows` of the store's inputs: never drawn are absent rows between two corpora, and views and further
    captions, which would count an image or a pair several times."""
    spans = store.record.input_spans
    ends = np.cumsum([len(span.rows) for span in spans])
    drawn = draw_rows(int(ends[-1]), count, seed)
    gaps = np.array([span.rows.start for span in spans]) - np.r_[0, ends[:-1]]
    return np.asarray(drawn + gaps[np.searchsorted(ends, drawn, side="right")])


def unit(values: NDArray[np.floating[Any]]) -> Singles:
    """Return rows (n, D) divided by their Euclidean norm, in float32; a zero row stays zero. The norm is taken in
    float64: squares of float16 values beyond 255 already leave float16."""
    wide = values.astype(np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide, dtype=np.float64))
    return (wide / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)


def truly_sound(values: NDArray[np.floating[Any]]) -> Bools:
    """Return which rows (n,) are finite and not zero, regardless of the ledger."""
    return np.asarray(np.isfinite(values).all(axis=1) & (values != 0).any(axis=1))


@dataclass(frozen=True)
class Distribution:
    """Quantiles and histogram of a set of numbers. All fields but `count` are NaN or empty when there are none."""

    count: int
    mean: float = float("nan")
    minimum: float = float("nan")
    q01: float = float("nan")
    q25: float = float("nan")
    median: float = float("nan")
    q75: float = float("nan")
    q99: float = float("nan")
    maximum: float = float("nan")
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


def distribution(values: NDArray[np.floating[Any]], span: tuple[float, float] | None = None) -> Distribution:
    """Summarize the finite `values` (n,). `span`: ends of the histogram; values outside count in the end bins."""
    numbers = values[np.isfinite(values)].astype(np.float64)
    if not len(numbers):
        return Distribution(0)
    low, high = span or (float(numbers.min()), float(numbers.max()))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1.0):
        # All (nearly) equal, as unit norms in float16 may be: a histogram needs some width.
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(np.clip(numbers, low, high), bins=BINS, range=(low, high))
    minimum, q01, q25, median, q75, q99, maximum = np.quantile(numbers, (0, 0.01, 0.25, 0.5, 0.75, 0.99, 1)).tolist()
    bins = tuple(edges.tolist()), tuple(counts.tolist())
    return Distribution(len(numbers), float(numbers.mean()), minimum, q01, q25, median, q75, q99, maximum, *bins)
