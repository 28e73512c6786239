"""Exact nearest rows by cosine, straight from the mapped array."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.base.process import usable_cores
from mmkd.store.array import FeatureArray
from mmkd.store.inspect.faiss_choice import choose, faiss_module
from mmkd.store.inspect.rows import captions_of
from mmkd.store.inspect.sampling import BLOCK_ROWS, unit
from mmkd.store.layout import Tower

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

MAX_NEIGHBORS = 10_000

FAISS_ROWS = 1 << 17
"""Rows from which faiss, where it is installed, makes a first choice: below, loading it takes longer than it saves."""
SPARE = 4
"""Rows that it chooses for each one wanted: lengths may differ by so much that the order changes among them."""
_SMALLEST_NORM = 1e-15

Piece = slice | NDArray[np.int64]
"""Some rows of an array."""
Found = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Rows and their cosines, best first."""

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
    """Return the k rows whose feature has the largest cosine with `query`; equal cosines by row. Reads every row once,
    `BLOCK_ROWS` at a time, on all cores; memory stays flat. The result does not depend on the number of cores. Result:
    row numbers int64 and cosines float32, both (k,), best first. Raises UserError if `k` is out of range, the query's
    width is not the teacher's, or it is zero or not finite.

    Args:
        store: the store.
        slug: teacher.
        tower: which features are searched.
        query: (D,), any length but zero.
        k: how many; fewer come back when fewer rows are sound.
        rows: int64 ascending, to search these only; all when None.
    """
    if not 1 <= k <= MAX_NEIGHBORS:
        raise UserError(f"{k} neighbours cannot be had; ask for 1 to {MAX_NEIGHBORS:,}")
    array = store.features(slug, tower)
    if query.shape != (array.shape[1],):
        raise UserError(
            f"a query of shape {query.shape} does not fit {slug}, whose features have {array.shape[1]} values"
        )
    direction = unit(query[None].astype(np.float32))[0]
    if not np.isfinite(direction).all() or not direction.any():
        raise UserError(f"the query has no direction in the space of {slug}: it is zero or not finite")
    # A slice and not a list of numbers, where all rows are asked for: no copy is made before the change to float32.
    size = len(array) if rows is None else len(rows)
    pieces: list[Piece] = [
        slice(start, min(start + BLOCK_ROWS, size)) if rows is None else rows[start : start + BLOCK_ROWS]
        for start in range(0, size, BLOCK_ROWS)
    ]
    best_rows, best = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    with ThreadPoolExecutor(usable_cores()) as pool:
        work = _chosen_nearest if _fits_faiss(array) else _nearest
        for found, cosines in pool.map(lambda piece: work(array, piece, direction, k), pieces):
            best_rows, best = _first(np.r_[best_rows, found], np.r_[best, cosines], k)
    return best_rows, best


def _fits_faiss(array: FeatureArray) -> bool:
    mapped = isinstance(array, np.ndarray) and array.dtype == np.float16
    return mapped and len(array) >= FAISS_ROWS and faiss_module() is not None


def _chosen_nearest(array: FeatureArray, piece: Piece, direction: NDArray[np.float32], k: int) -> Found:
    """As `_nearest`, of those rows alone that faiss chose; of all where it cannot be proven that these suffice."""
    values = array[piece]
    if len(values) > SPARE * k:
        positions, bound = choose(values, direction, SPARE * k)
        rows, cosines = _nearest(values, positions, direction, k)
        # Products of faiss are summed in another order: a few units in the last place of a float32.
        if len(cosines) == k and cosines[-1] > bound + 1e-5:
            return (rows + piece.start if isinstance(piece, slice) else piece[rows]), cosines
    return _nearest(array, piece, direction, k)


def _nearest(array: FeatureArray, piece: Piece, direction: NDArray[np.float32], k: int) -> Found:
    """Return the k nearest of some rows. Missing rows are NaN and never near; zero rows have no direction."""
    values = array[piece].astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", values, values))
        # Squares that leave float32 at either end, which those of no float16 feature do.
        if (np.isinf(norms) | ((norms < _SMALLEST_NORM) & values.any(axis=1))).any():
            values, norms = unit(values), np.ones(len(values), dtype=np.float32)
        cosines = (values @ direction) / norms
    numbers = np.arange(piece.start, piece.stop, dtype=np.int64) if isinstance(piece, slice) else piece
    sound = np.flatnonzero(np.isfinite(cosines) & (norms > 0) & values.any(axis=1))
    return _first(numbers[sound], cosines[sound], k)


def _first(rows: NDArray[np.int64], cosines: NDArray[np.float32], k: int) -> Found:
    order = np.lexsort((rows, -cosines))[:k]
    return rows[order], cosines[order]


def neighbors(store: FeatureStore, slug: str, tower: Tower, query: NDArray[np.floating[Any]], k: int = 10) -> pa.Table:
    """Run `nearest_rows` over the whole store; return a table of `SCHEMA`, best first: `rank` (from 1), `row`,
    `cosine`, and `key`, `modality`, `caption` of the sample row. Raises UserError as `nearest_rows`.

    Args:
        store: the store.
        slug: teacher.
        tower: which features are searched.
        query: (D,), any length but zero.
        k: how many; fewer come back when fewer rows are sound.
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
