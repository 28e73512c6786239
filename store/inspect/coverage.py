"""Shards present per teacher and their share of sound rows, from the ledger alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.store.reader import FeatureStore

MAP_COLUMNS = 64
"""Cells of a row of the printed map: with the longest usual name it fits a terminal of 100 characters."""
FULL, MOST, SOME, NONE = "█", "▓", "░", "·"
"""Cells of the map: at least 95 % of the rows sound, at least half, fewer; and a hole: a shard is missing."""


@dataclass(frozen=True)
class Coverage:
    """Teachers by shards."""

    teachers: tuple[str, ...]
    rows: tuple[int, ...]
    done: NDArray[np.bool_]
    """(T, S): the shard has a ledger entry."""
    image: NDArray[np.float64]
    text: NDArray[np.float64]
    """(T, S): rows with a sound feature, as a share of the shard's rows; 0 where there is no entry."""

    def holes(self, slug: str) -> list[tuple[int, int]]:
        """Return ranges (first, last) of shards that the teacher lacks, in order."""
        missing = np.flatnonzero(~self.done[self.teachers.index(slug)])
        runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
        return [(int(run[0]), int(run[-1])) for run in runs if len(run)]

    def line(self, slug: str, columns: int = MAP_COLUMNS, ascii_only: bool = False) -> str:
        """Return one teacher's shards in at most `columns` characters; shards that share one show the worst of them."""
        index = self.teachers.index(slug)
        share = np.maximum(self.image[index], self.text[index])
        cells = ""
        for group in np.array_split(np.arange(len(self.rows)), min(columns, len(self.rows)) or 1):
            worst = float(share[group].min())
            sound = FULL if worst >= 0.95 else MOST if worst >= 0.5 else SOME
            cells += sound if self.done[index][group].all() else NONE
        return cells.translate(str.maketrans(FULL + MOST + SOME + NONE, "#+-.")) if ascii_only else cells

    def as_json(self) -> dict[str, Any]:
        """Return the map as plain values, holes as ranges."""
        return {
            slug: {
                "holes": self.holes(slug),
                "image": [round(share, 4) for share in self.image[index].tolist()],
                "text": [round(share, 4) for share in self.text[index].tolist()],
            }
            for index, slug in enumerate(self.teachers)
        }


def coverage(store: FeatureStore) -> Coverage:
    """Read the ledger as a map of teachers by shards. Reads no feature."""
    rows = tuple(len(store.record.shard_rows(shard)) for shard in range(store.shards))
    shape = (len(store.teachers), store.shards)
    done, image, text = np.zeros(shape, dtype=bool), np.zeros(shape), np.zeros(shape)
    for (index, slug), shard in product(enumerate(store.teachers), range(store.shards)):
        if entry := store.ledger.get((shard, slug)):
            done[index, shard] = True
            image[index, shard] = entry.image_rows / rows[shard]
            text[index, shard] = entry.text_rows / rows[shard]
    return Coverage(tuple(store.teachers), rows, done, image, text)


def shard_ranges(ranges: list[tuple[int, int]], most: int = 8) -> str:
    """Return ranges as a user writes them: `3, 7-9`; beyond `most` of them only their number is given."""
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    shown += [f"and {len(ranges) - most} more ranges"] if len(ranges) > most else []
    return ", ".join(shown)
