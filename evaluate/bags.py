"""Rows of the store as bags: the patches of a slide, or all that is known of a patient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.dataset import DatasetRows, Samples
from mmkd.evaluate.features import Block, Features
from mmkd.evaluate.metrics import Floats
from mmkd.store import UserError
from mmkd.store.layout import Tower


@dataclass(frozen=True)
class Bags:
    """Bags of rows, in the order of their first rows. ids: str (n,), the bag's value. samples: the rows. members: for
    every bag the positions of its rows in `samples`."""

    data: DatasetRows
    ids: NDArray[np.object_]
    samples: Samples
    members: tuple[NDArray[np.int64], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> NDArray[np.object_]:
        """Return a column of the sample table, which all rows of a bag agree on: str or None (n,). Raises UserError if
        a bag's rows differ."""
        return self.agreed(self.samples.column(name), name)

    @property
    def groups(self) -> NDArray[np.object_]:
        """Groups of bags that depend on each other (patients), str (n,). Raises UserError if a bag's rows belong to two
        groups."""
        return self.agreed(self.data.groups(self.samples), self.data.spec.group or "key")

    @property
    def domains(self) -> NDArray[np.object_]:
        """Domain of every bag, str (n,). Raises UserError if a bag's rows belong to two domains."""
        return self.agreed(self.data.domains(self.samples), self.data.spec.domain or "data set")

    def agreed(self, values: NDArray[np.object_], what: str) -> NDArray[np.object_]:
        """Return the value that all rows of a bag have; `values` is one for each row. Raises UserError if a bag's rows
        differ."""
        found = np.empty(len(self), dtype=object)
        for i, member in enumerate(self.members):
            different = dict.fromkeys(values[member].tolist())
            if len(different) > 1:
                first, second = list(different)[:2]
                raise UserError(f"bag {self.ids[i]!r} has rows with {what} {first!r} and {second!r}; expected one")
            found[i] = next(iter(different))
        return found


IN_MEMORY_BYTES = 1 << 30
"""Features up to this size are held in memory: heads read every bag in every epoch, and a read of a small bag from the
map costs more than a step of training on it."""


@dataclass(frozen=True)
class BagFeatures:
    """Features that one model has of bags: in memory when they are small, else read from the map on demand."""

    bags: Bags
    features: Features
    tower: Tower
    normalized: bool
    """Every vector scaled to unit length, before means are taken and heads are trained."""

    def patches(self, bag: int, positions: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return features of a bag that are there, float32 (p, D); p may be 0. `bag`: index of the bag. `positions`:
        only these of its rows, int64; all by default."""
        member = self.bags.members[bag]
        wanted = member if positions is None else member[positions]
        if self._in_memory is not None:
            return self._in_memory.values[wanted[self._in_memory.available[wanted]]]
        block = self._read(self.bags.samples.rows[wanted])
        return block.values[block.available]

    @cached_property
    def _in_memory(self) -> Block | None:
        """Features of all rows, or None where they are too many."""
        rows = self.bags.samples.rows
        if len(rows) * self._read(rows[:1]).values.nbytes > IN_MEMORY_BYTES:
            return None
        return self._read(rows)

    def _read(self, rows: NDArray[np.int64]) -> Block:
        read = self.features.images if self.tower == "image" else self.features.texts
        return read(rows, normalized=self.normalized)

    def means(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Return mean feature of every bag, float64 (n, D), and bool (n,) which bags have one; NaN where not."""
        means = []
        for bag in range(len(self.bags)):
            patches = self.patches(bag).astype(np.float64)
            means.append(patches.mean(axis=0) if len(patches) else np.full(patches.shape[1], np.nan))
        stacked = np.stack(means)
        return stacked, ~np.isnan(stacked[:, 0])


def make_bags(data: DatasetRows, samples: Samples, by: str | None) -> Bags:
    """Put rows with the same value of column `by` into one bag; a row without a value is a bag of its own."""
    names = samples.ids if by is None else samples.filled(by, samples.ids)
    unique, first, inverse = np.unique(names.astype(str), return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    sorted_rows = np.argsort(inverse, kind="stable")
    bounds = np.cumsum(np.bincount(inverse))[:-1]
    members = np.split(sorted_rows.astype(np.int64), bounds)
    return Bags(data, unique[order].astype(object), samples, tuple(members[i] for i in order))
