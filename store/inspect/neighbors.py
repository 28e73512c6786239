"""Exact nearest rows by cosine. In large float16 stores faiss, where it is installed, makes a first choice, of which
the largest cosine that any other row can have is known: nothing is lost by it."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.arrays import Ints, Singles
from mmkd.base.errors import UserError
from mmkd.base.process import usable_cores
from mmkd.store.array import FeatureArray
from mmkd.store.inspect.rows import sample_rows
from mmkd.store.inspect.sampling import BLOCK_ROWS, unit
from mmkd.store.layout import Tower
from mmkd.store.reader import FeatureStore

MAX_NEIGHBORS = 10_000
FAISS_ROWS = 1 << 17
"""Rows from which faiss makes a first choice: below, loading it takes longer than it saves."""
SPARE = 4
"""Rows that faiss chooses for each one wanted: lengths may differ by so much that the order changes among them."""
_SMALLEST_NORM = 1e-15

Piece = slice | Ints
Nearest = tuple[Ints, Singles]
"""Rows and their cosines, best first."""


def nearest_rows(
    store: FeatureStore, slug: str, tower: Tower, query: NDArray[np.floating[Any]], k: int, rows: Ints | None = None
) -> Nearest:
    """Return the k sound rows of `rows` (int64 ascending; all inputs when None: an image's views, nearest to it, are
    none) with the largest cosine with `query` (D,), equal ones by row: row numbers int64 and cosines float32, best
    first. Memory stays flat. Raises UserError if `k` is out of range, or the query is zero, not finite, or not of the
    teacher's width."""
    if not 1 <= k <= MAX_NEIGHBORS:
        raise UserError(f"the number of neighbors must be 1 to {MAX_NEIGHBORS:,}, got {k}")
    array = store.features(slug, tower)
    if query.shape != (array.shape[1],):
        raise UserError(
            f"a query of shape {query.shape} does not fit {slug}, whose features have {array.shape[1]} values"
        )
    direction = unit(query[None].astype(np.float32))[0]
    if not np.isfinite(direction).all() or not direction.any():
        raise UserError(f"the query has no direction in the space of {slug}: it is zero or not finite")
    # Slices, where all inputs are wanted: nothing is copied before the change to float32.
    spans = [span.rows for span in store.record.input_spans] if rows is None else [range(len(rows))]
    slices = [slice(at, min(at + BLOCK_ROWS, span.stop)) for span in spans for at in span[::BLOCK_ROWS]]
    pieces: list[Piece] = [part if rows is None else rows[part] for part in slices]
    half = isinstance(array, np.ndarray) and array.dtype == np.float16
    search = _nearest_by_faiss if half and len(array) >= FAISS_ROWS and faiss_module() is not None else _nearest
    best_rows, best = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    with ThreadPoolExecutor(usable_cores()) as pool:
        for some, cosines in pool.map(lambda piece: search(array, piece, direction, k), pieces):
            best_rows, best = _first(np.r_[best_rows, some], np.r_[best, cosines], k)
    return best_rows, best


def _nearest(array: FeatureArray, piece: Piece, direction: Singles, k: int) -> Nearest:
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


def _first(rows: Ints, cosines: Singles, k: int) -> Nearest:
    order = np.lexsort((rows, -cosines))[:k]
    return rows[order], cosines[order]


@cache
def faiss_module() -> Any:
    """Return faiss, or None where it is not installed (extra `faiss`)."""
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError:
        return None


def _nearest_by_faiss(array: FeatureArray, piece: Piece, direction: Singles, k: int) -> Nearest:
    """As `_nearest`, of those rows alone that faiss chose; of all where it cannot be proven that these suffice."""
    values = array[piece]
    if len(values) > SPARE * k:
        positions, bound = choose(values, direction, SPARE * k)
        rows, cosines = _nearest(values, positions, direction, k)
        # Products of faiss are summed in another order: a few units in the last place of a float32.
        if len(cosines) == k and cosines[-1] > bound + 1e-5:
            return (rows + piece.start if isinstance(piece, slice) else piece[rows]), cosines
    return _nearest(array, piece, direction, k)


def choose(values: NDArray[np.float16], direction: Singles, count: int) -> tuple[Ints, float]:
    """Return positions, ascending, of the `count` rows of float16 (n, D) with the largest inner product with a unit
    vector (D,), and the largest cosine that another row can have: at most the least chosen product divided by the
    shortest row's length. Rows with NaN are never chosen."""
    products, positions = _search(values, direction, count, "METRIC_INNER_PRODUCT")
    if len(positions) < min(count, len(values)):
        return np.sort(positions), -np.inf  # every row that has a product
    # The row nearest to the origin is the shortest; faiss gives squares.
    squares, _ = _search(values, np.zeros_like(direction), 1, "METRIC_L2")
    length = float(np.sqrt(squares[0])) if len(squares) else 0.0
    return np.sort(positions), np.inf if length == 0.0 else max(float(products[-1]), 0.0) / length


def _search(values: NDArray[np.float16], query: Singles, count: int, metric: str) -> tuple[Singles, Ints]:
    faiss = faiss_module()
    index = faiss.IndexScalarQuantizer(values.shape[1], faiss.ScalarQuantizer.QT_fp16, getattr(faiss, metric))
    index.is_trained = True  # float16 has nothing to learn
    index.add_sa_codes(np.ascontiguousarray(values).view(np.uint8))
    distances, positions = index.search(query[None], min(count, len(values)))
    there = positions[0] >= 0
    return distances[0][there], positions[0][there]


def neighbors(store: FeatureStore, slug: str, tower: Tower, query: NDArray[np.floating[Any]], k: int = 10) -> pa.Table:
    """Run `nearest_rows` over all inputs. Return a table, best first: `rank` (int64, from 1), `row` (int64),
    `cosine` (float32), and `key`, `modality`, `caption` of the sample row. Raises UserError as `nearest_rows`."""
    rows, cosines = nearest_rows(store, slug, tower, query, k)
    samples = sample_rows(store, rows)
    found = {"rank": pa.array(range(1, len(rows) + 1), pa.int64()), "row": rows, "cosine": cosines}
    return pa.table(found | {name: samples[name] for name in ("key", "modality", "caption")})
