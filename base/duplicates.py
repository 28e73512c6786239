"""Find repeated keys among any number of rows in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

_ROWS_A_PASS = 1 << 19
"""Rows that are looked at together: 16 bytes each, some MB."""


def key_hash(key: str) -> bytes:
    """Return 16 bytes for a key: among 10^9 keys two share them by chance once in 10^20 corpora."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find_duplicates(hashes: Callable[[], Iterable[NDArray[np.uint64]]], total: int) -> dict[int, int]:
    """Return rows whose key occurred before, and the first row that had it.

    Args:
        hashes: yields the keys' hashes as uint64 (n, 2) in row order; called once per pass over them.
        total: rows in all; decides the number of passes.

    Each pass takes the hashes of one residue class: equal keys are always in the same one.
    """
    passes = max(1, -(-total // _ROWS_A_PASS))
    found: dict[int, int] = {}
    for number in range(passes):
        rows, values = _selected(hashes(), number, passes)
        order = np.lexsort((rows, values[:, 1], values[:, 0]))
        rows, values = rows[order], values[order]
        again = np.flatnonzero((values[1:] == values[:-1]).all(axis=1)) + 1
        found.update(_firsts(rows, again))
    return found


def _firsts(rows: NDArray[np.int64], again: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    first = -1
    previous = -2
    for index in again.tolist():
        if index != previous + 1:
            first = int(rows[index - 1])
        previous = index
        yield int(rows[index]), first


def _selected(
    batches: Iterable[NDArray[np.uint64]], number: int, passes: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    rows = [np.empty(0, dtype=np.int64)]
    values = [np.empty((0, 2), dtype=np.uint64)]
    start = 0
    for batch in batches:
        chosen = np.flatnonzero(batch[:, 0] % np.uint64(passes) == number)
        rows.append(chosen + start)
        values.append(batch[chosen])
        start += len(batch)
    return np.concatenate(rows), np.concatenate(values)
