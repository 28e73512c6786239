"""Exact nearest rows by cosine, straight from the mapped array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.store.array import FeatureArray
from mmkd.store.errors import UserError
from mmkd.store.inspect.rows import captions_of
from mmkd.store.inspect.sampling import BLOCK_ROWS, blocks, features, unit
from mmkd.store.layout import Tower

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

MAX_NEIGHBORS = 10_000

SCHEMA = pa.schema(
    [
        pa.field("rank", pa.int64()),
        pa.field("row", pa.int64()),
        pa.field("cosine", pa.float32()),
        pa.field("key", pa.string()),
        pa.field("modality", pa.string()),
        pa.field("caption", pa.string()),
    ]
)


def nearest_rows(
    store: FeatureStore,
    slug: str,
    tower: Tower,
    query: NDArray[np.floating[Any]],
    k: int,
    rows: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k rows whose feature has the largest cosine with `query`; equal cosines by row.

    Reads every row once, front to back, `BLOCK_ROWS` at a time; memory stays flat.

    Args:
        store: the store.
        slug: teacher.
        tower: which features are searched.
        query: (D,), any length but zero.
        k: how many; fewer come back when fewer rows are sound.
        rows: int64 ascending, to search these only; all when None.

    Returns:
        Row numbers int64 and cosines float32, both (k,), best first.

    Raises:
        UserError: `k` is out of range, the query's width is not the teacher's, or it is zero or not finite.
    """
    if not 1 <= k <= MAX_NEIGHBORS:
        raise UserError(f"{k} neighbours cannot be had; ask for 1 to {MAX_NEIGHBORS:,}")
    array = features(store, slug, tower)
    if query.shape != (array.shape[1],):
        raise UserError(
            f"a query of shape {query.shape} does not fit {slug}, whose features have {array.shape[1]} values"
        )
    direction = unit(query[None].astype(np.float32))[0]
    if not np.isfinite(direction).all() or not direction.any():
        raise UserError(f"the query has no direction in the space of {slug}: it is zero or not finite")
    best_rows, best = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    for block, values in _values(array, rows):
        with np.errstate(invalid="ignore"):
            cosines = unit(values) @ direction
        # Missing rows are NaN and never near; zero rows have no direction.
        sound = np.flatnonzero(np.isfinite(cosines) & values.any(axis=1))
        best_rows, best = np.r_[best_rows, block[sound]], np.r_[best, cosines[sound]]
        order = np.lexsort((best_rows, -best))[:k]
        best_rows, best = best_rows[order], best[order]
    return best_rows, best


def _values(array: FeatureArray, rows: NDArray[np.int64] | None) -> Any:
    if rows is not None:
        yield from ((block, array[block]) for block in blocks(rows))
        return
    for start in range(0, len(array), BLOCK_ROWS):
        # A slice and not a list of numbers: no copy is made before the change to float32.
        piece = array[start : start + BLOCK_ROWS]
        yield np.arange(start, start + len(piece), dtype=np.int64), piece


def neighbors(store: FeatureStore, slug: str, tower: Tower, query: NDArray[np.floating[Any]], k: int = 10) -> pa.Table:
    """`nearest_rows` over the whole store with what the rows are: a table of `SCHEMA`, best first.

    Raises:
        UserError: as `nearest_rows`.
    """
    rows, cosines = nearest_rows(store, slug, tower, query, k)
    samples = captions_of(store, rows)
    return pa.table(
        {
            "rank": pa.array(range(1, len(rows) + 1), pa.int64()),
            "row": pa.array(rows, pa.int64()),
            "cosine": pa.array(cosines, pa.float32()),
            **{name: samples[name] for name in ("key", "modality", "caption")},
        },
        schema=SCHEMA,
    )
