"""Shards present per teacher and their share of sound rows, from the ledger alone."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from mmkd.base.arrays import Bools, Floats, Ints
from mmkd.store.layout import TOWERS, Tower
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
    done: Bools
    """(T, S): the shard has a ledger entry, or nothing that the teacher is asked for."""
    share: dict[Tower, Floats]
    """(T, S): rows with a sound feature, by share of the shard's rows; 0 without an entry, NaN if not asked for."""

    def holes(self, slug: str) -> list[tuple[int, int]]:
        """Return ranges (first, last) of shards that the teacher lacks, in order."""
        return ranges_of(np.flatnonzero(~self.done[self.teachers.index(slug)]))

    @property
    def fuller(self) -> Floats:
        """Return the share of the fuller tower, float64 (T, S); 1 where a teacher is asked for nothing."""
        return np.nan_to_num(np.fmax(*self.share.values()), nan=1.0)

    def line(self, slug: str, columns: int = MAP_COLUMNS, ascii_only: bool = False) -> str:
        """Return one teacher's shards in at most `columns` characters; shards that share one show the worst of them."""
        index = self.teachers.index(slug)
        share = self.fuller[index]
        cells = ""
        for group in np.array_split(np.arange(len(self.rows)), min(columns, len(self.rows)) or 1):
            worst = float(share[group].min())
            sound = FULL if worst >= 0.95 else MOST if worst >= 0.5 else SOME
            cells += sound if self.done[index][group].all() else NONE
        return cells.translate(str.maketrans(FULL + MOST + SOME + NONE, "#+-.")) if ascii_only else cells

    def as_json(self) -> dict[str, Any]:
        """Return the map as plain values, holes as ranges."""
        return {
            slug: {"holes": self.holes(slug)}
            | {
                tower: [None if math.isnan(one) else round(one, 4) for one in share[index].tolist()]
                for tower, share in self.share.items()
                if not np.isnan(share[index]).all()
            }
            for index, slug in enumerate(self.teachers)
        }


def coverage(store: FeatureStore) -> Coverage:
    """Read the ledger as a map of teachers by shards. Reads no feature."""
    rows = tuple(len(store.record.shard_rows(shard)) for shard in range(store.shards))
    shape = (len(store.teachers), store.shards)
    done, share = np.zeros(shape, dtype=bool), {tower: np.full(shape, np.nan) for tower in TOWERS}
    for (index, (slug, card)), span in product(enumerate(store.teachers.items()), store.record.spans()):
        asked = [tower for tower in card.towers if tower in span.corpus.towers]
        for shard in span.shards:
            entry = store.ledger.get((shard, slug))
            done[index, shard] = entry is not None or not asked
            for tower in asked:
                share[tower][index, shard] = entry.sound_rows(tower) / rows[shard] if entry else 0
    return Coverage(tuple(store.teachers), rows, done, share)


def ranges_of(numbers: Ints) -> list[tuple[int, int]]:
    """Return ranges (first, last) of ascending numbers."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [(int(run[0]), int(run[-1])) for run in runs if len(run)]


def shard_ranges(ranges: list[tuple[int, int]], most: int = 8) -> str:
    """Return ranges as a user writes them: `3, 7-9`; beyond `most` of them only their number is given."""
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    shown += [f"and {len(ranges) - most} more ranges"] if len(ranges) > most else []
    return ", ".join(shown)
