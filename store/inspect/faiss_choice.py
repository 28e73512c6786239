"""A first choice of near rows by faiss, where it is installed: it multiplies float16 as it lies, without widening it.
Nothing is lost by it: the choice comes with the largest cosine that any row outside it can have."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Choice = tuple[NDArray[np.int64], float]
"""Positions of the chosen rows, ascending, and the largest cosine that another row can have."""


@cache
def faiss_module() -> Any:
    """faiss, or None where it is not installed (extra `faiss`)."""
    try:
        import faiss  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        return None
    return faiss


def choose(values: NDArray[np.float16], direction: NDArray[np.float32], count: int) -> Choice:
    """The `count` rows with the largest inner product, of float16 (n, D) with a unit vector (D,). A row that was not
    chosen has no larger product than the least chosen one, and no smaller length than the shortest row: its cosine is
    at most the one divided by the other. Rows with NaN are never chosen, and have no cosine."""
    products, positions = _search(values, direction, count, "METRIC_INNER_PRODUCT")
    if len(positions) < min(count, len(values)):
        return np.sort(positions), -np.inf  # every row that has a product
    # The nearest to the origin is the shortest; faiss gives squares.
    shortest, _ = _search(values, np.zeros_like(direction), 1, "METRIC_L2")
    least, length = float(products[-1]), float(np.sqrt(shortest[0])) if len(shortest) else 0.0
    bound = np.inf if length == 0.0 else max(least, 0.0) / length
    return np.sort(positions), bound


def _search(
    values: NDArray[np.float16], query: NDArray[np.float32], count: int, metric: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    faiss = faiss_module()
    index = faiss.IndexScalarQuantizer(values.shape[1], faiss.ScalarQuantizer.QT_fp16, getattr(faiss, metric))
    index.is_trained = True  # float16 has nothing to learn
    index.add_sa_codes(np.ascontiguousarray(values).view(np.uint8))
    distances, positions = index.search(query[None], min(count, len(values)))
    there = positions[0] >= 0
    return distances[0][there], positions[0][there]
