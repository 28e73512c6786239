"""Rows drawn by seed, and their features as unit vectors: what every statistic starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

BLOCK_ROWS = 4096
"""Rows brought to float32 at a time: 8 MB at width 512, so that memory stays flat however many rows are read."""


def draw_rows(pool: NDArray[np.int64] | int, count: int | None, seed: int) -> NDArray[np.int64]:
    """Return rows without replacement, in order. Result: int64 (min(count, N),), ascending, so that the store is then
    read from front to back. Raises UserError if `count` is not positive. `pool`: rows to draw from, or their number N
    for 0 to N - 1. `count`: how many; all when None or when there are no more. `seed`: of `numpy.random.default_rng`;
    the same rows for the same arguments."""
    size = pool if isinstance(pool, int) else len(pool)
    if count is not None and count < 1:
        raise UserError(f"a sample of {count} rows says nothing; give 1 or more")
    if count is None or count >= size:
        picked = np.arange(size, dtype=np.int64)
    else:
        picked = np.sort(np.random.default_rng(seed).choice(size, count, replace=False, shuffle=False))
    return picked if isinstance(pool, int) else pool[picked]


def draw_inputs(store: FeatureStore, count: int | None, seed: int) -> NDArray[np.int64]:
    """Return the grid rows of inputs without replacement, in order; absent rows between two corpora are never drawn.
    Args, returns and raises as `draw_rows`."""
    spans = store.record.spans()
    ends = np.cumsum([len(span.rows) for span in spans])
    drawn = draw_rows(int(ends[-1]), count, seed)
    gaps = np.array([span.rows.start for span in spans]) - np.r_[0, ends[:-1]]
    rows: NDArray[np.int64] = drawn + gaps[np.searchsorted(ends, drawn, side="right")]
    return rows


def blocks(rows: NDArray[np.int64], size: int = BLOCK_ROWS) -> Iterator[NDArray[np.int64]]:
    """Yield pieces of `rows` of at most `size`, in order."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def unit(values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return rows (n, D) divided by their Euclidean norm, in float32; a zero row stays zero. The norm is taken in
    float64: squares of float16 values beyond 255 already leave float16."""
    wide = values.astype(np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide, dtype=np.float64))
    return (wide / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)


def truly_sound(values: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Return rows (n,) that are finite and not zero, regardless of the ledger."""
    finite: NDArray[np.bool_] = np.isfinite(values).all(axis=1) & (values != 0).any(axis=1)
    return finite
