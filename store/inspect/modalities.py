"""Rows by the modality that the sample table states: CT, MRI, histology, ..."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

NOT_STATED, OTHERS = "not stated", "all others"

MOST = 12
"""Modalities listed; rarer ones are counted as `OTHERS`."""


@dataclass(frozen=True)
class Modalities:
    """Modality of each row."""

    names: tuple[str, ...]
    """Most frequent first, then `OTHERS` where there are more than `MOST`."""
    codes: NDArray[np.uint8]
    """(N,) a place in `names` for every row of the store."""


def modalities(column: pa.ChunkedArray) -> Modalities:
    """Group rows by their entry in the column `modality` (strings, null where none is stated)."""
    encoded = pc.fill_null(column, NOT_STATED).combine_chunks().dictionary_encode()
    every = encoded.dictionary.to_pylist()
    indices = encoded.indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(indices, minlength=len(every))
    order = sorted(range(len(every)), key=lambda i: (-counts[i], every[i]))
    kept = order[:MOST]
    place = np.full(max(len(every), 1), len(kept), dtype=np.uint8)
    place[kept] = np.arange(len(kept), dtype=np.uint8)
    names = [every[i] for i in kept] + ([OTHERS] if len(order) > len(kept) else [])
    return Modalities(tuple(names), place[indices])
