"""Blocks of rows of all teachers as unit vectors, and the random rows they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.store.array import consecutive
from mmkd.store.layout import Tower
from mmkd.store.reader import FeatureStore

BLOCK_ROWS = 2048
"""Rows per block: with a pool of 256, a block's features and products stay in a core's cache."""

TIE = 1e-5
"""Cosines closer than this are equal: a caption does not lose to its own copy by rounding."""

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]


def unit_rows(store: FeatureStore, slug: str, tower: Tower, rows: slice | Rows, sound: Bools) -> Floats:
    """Unit features of some rows, float32 (n, D); zero where `sound`, bool (n,), is false."""
    features = store.features(slug, tower)
    picked = consecutive(features, rows) if isinstance(rows, slice) else features[rows]
    values: Floats = np.asarray(picked, dtype=np.float32)
    if not sound.all():
        values = np.where(sound[:, None], values, np.float32(0))
    norms = np.sqrt(np.einsum("nd,nd->n", values, values))
    return np.divide(values, np.where(norms > 0, norms, 1)[:, None], out=values if values.flags.writeable else None)


@dataclass(frozen=True)
class Columns:
    """The pairs to judge: a store, teachers, and where both features exist, bool (N, T)."""

    store: FeatureStore
    slugs: tuple[str, ...]
    available: Bools


@dataclass
class Block:
    """Rows `rows` of all teachers; features are read once, when a scorer needs them."""

    columns: Columns
    rows: slice
    _unit: dict[tuple[int, Tower], Floats] = field(default_factory=dict)

    @cached_property
    def sound(self) -> Bools:
        """bool (n, T)."""
        return self.columns.available[self.rows]

    def unit(self, teacher: int, tower: Tower) -> Floats:
        """Unit features of one teacher, float32 (n, D); zero where it has no pair."""
        if (teacher, tower) not in self._unit:
            slug = self.columns.slugs[teacher]
            sound = self.sound[:, teacher]
            self._unit[teacher, tower] = unit_rows(self.columns.store, slug, tower, self.rows, sound)
        return self._unit[teacher, tower]


def draw_rows(eligible: Rows, count: int, seed: int, what: str) -> Rows:
    """Draw `count` of the eligible rows, int64 (n,): int64 (count,), ascending. Every row has a random number that is a
    function of (seed, row); the smallest win. So the draw does not depend on shards, the order of work, or rows
    appended later that are not eligible. Raises UserError if fewer rows are eligible; `what` names the purpose in the
    message."""
    if len(eligible) < count:
        raise UserError(f"{what} needs {count} rows with all features, there are {len(eligible)}; lower `among`")
    numbers = _mix(eligible.astype(np.uint64) ^ _mix(np.array([seed], dtype=np.uint64)))
    return np.sort(eligible[np.argsort(numbers, kind="stable")[:count]])


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a bijection that looks random."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def check_teachers(store: FeatureStore, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the teachers to judge, in the store's order. Raises UserError for an unknown name, or no teacher at
    all."""
    for slug in wanted:
        store.card(slug)
    slugs = tuple(slug for slug in store.teachers if not wanted or slug in wanted)
    if not slugs:
        raise UserError(f"{store.root} has no teachers; `mmkd extract` adds some")
    return slugs
