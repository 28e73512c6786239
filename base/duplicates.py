"""Find repeated keys among any number of rows in bounded memory."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

_ROWS_A_PASS = 1 << 19
"""Rows that are looked at together: 16 bytes each, some MB."""


def key_hash(key: str) -> bytes:
    """Return 16 bytes for a key: among 10^9 keys two share them by chance once in 10^20 corpora."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find_duplicates(hashes: Callable[[], Iterable[NDArray[np.uint64]]], total: int) -> dict[int, int]:
    """Return rows whose key occurred before, and the first row that had it. `hashes` yields the keys' hashes as uint64
    (n, 2) in row order; it is called once per pass over the `total` rows. Each pass takes the hashes of one residue
    class: equal keys are always in the same one."""
    passes = max(1, -(-total // _ROWS_A_PASS))
    found: dict[int, int] = {}
    for number in range(passes):
        chosen, chosen_rows, start = [np.empty((0, 2), dtype=np.uint64)], [np.empty(0, dtype=np.int64)], 0
        for batch in hashes():
            own = np.flatnonzero(batch[:, 0] % np.uint64(passes) == number)
            chosen.append(batch[own])
            chosen_rows.append(own + start)
            start += len(batch)
        values, rows = np.concatenate(chosen), np.concatenate(chosen_rows)
        order = np.lexsort((rows, values[:, 1], values[:, 0]))
        values, rows = values[order], rows[order]
        again = np.flatnonzero((values[1:] == values[:-1]).all(axis=1)) + 1
        first = np.arange(len(rows))
        first[again] = 0
        first = np.maximum.accumulate(first)
        found.update(zip(rows[again].tolist(), rows[first[again]].tolist(), strict=True))
    return found
