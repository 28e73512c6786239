"""Features of chosen rows and of bags of rows: float32, of unit length or as stored, and which are available."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from mmkd.base.arrays import Bools, Floats, Ints, Objects, Singles
from mmkd.evaluate.dataset import DatasetRows, Samples
from mmkd.store import FeatureStore, UserError
from mmkd.store.layout import SOUND_BIT, Tower

IN_MEMORY_BYTES = 1 << 30
"""Features of bags up to this size are held in memory: heads read every bag in every epoch, and a read of a small bag
from the map costs more than a step of training on it."""


@dataclass(frozen=True)
class Block:
    """Features of n rows. values: float32 (n, D), of unit length or as stored; NaN where not available, so that misuse
    shows. available: bool (n,)."""

    values: Singles
    available: Bools


class Features:
    """Features of one model, or an ensemble of `members`, in one store. An ensemble's feature is the concatenation of
    its members' unit features, scaled to unit length: its cosine is the mean of theirs; without normalization it is the
    bare concatenation. `beside`: models without whose features a row counts as not available here either."""

    def __init__(
        self, store: FeatureStore, model: str, members: tuple[str, ...] = (), beside: tuple["Features", ...] = ()
    ) -> None:
        self.store, self.model, self.members, self.beside = store, model, members or (model,), beside
        for slug in self.members:
            store.card(slug)

    def images(self, rows: Ints) -> Block:
        """Image features of these grid rows, of unit length, members joined."""
        return self.read("image", rows, normalized=True)

    def texts(self, rows: Ints) -> Block:
        """Caption features of these grid rows, of unit length, members joined."""
        return self.read("text", rows, normalized=True)

    def each_member(self) -> tuple["Features", ...]:
        return tuple(Features(self.store, slug, beside=self.beside) for slug in self.members)

    def digest(self, rows: Ints) -> str:
        """16 hex digits of the teacher digests and checksums that the ledger has of the shards of these rows."""
        shards = np.unique(rows // self.store.record.rows_per_shard).tolist()
        sha = hashlib.sha256()
        for slug in self.members:
            for shard in shards:
                entry = self.store.ledger.get((shard, slug))
                found = "nothing"
                if entry is not None:
                    found = f"{entry.teacher_digest} {entry.image_crc32c} {entry.text_crc32c} {entry.valid_crc32c}"
                sha.update(f"{slug} {shard} {found}\n".encode())
        return sha.hexdigest()[:16]

    def read(self, tower: Tower, rows: Ints, normalized: bool) -> Block:
        """Features of one tower. Raises UserError for a row or a tower that the store does not have."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self.store)):
            raise UserError(
                f"row {rows.max()} is outside {self.store.root}, which has {len(self.store)} rows; extract it again"
            )
        blocks = [self._of_member(slug, tower, rows, normalized) for slug in self.members]
        others = [other.read(tower, rows, normalized) for other in self.beside]
        available = np.logical_and.reduce([block.available for block in (*blocks, *others)])
        values = np.concatenate([block.values for block in blocks], axis=1)
        if len(blocks) > 1 and normalized:
            values *= np.float32(1 / np.sqrt(len(blocks)))
        values[~available] = np.nan
        return Block(values, available)

    def sound(self, tower: Tower, rows: Ints) -> Bools:
        """Whether all members have features of these grid rows, bool (n,), by the store's own marks."""
        marks = [(self.store.valid(one)[rows] & SOUND_BIT[tower]) != 0 for one in self.members]
        return np.asarray(np.logical_and.reduce(marks))

    def _of_member(self, slug: str, tower: Tower, rows: Ints, normalized: bool) -> Block:
        values = np.asarray(self.store.features(slug, tower)[rows], dtype=np.float32)
        norms = np.sqrt(np.square(values, dtype=np.float32).sum(axis=1, dtype=np.float64))
        sound = (self.store.valid(slug)[rows] & SOUND_BIT[tower]) != 0
        available = sound & np.isfinite(norms) & (norms > 0)
        if normalized:
            values[available] /= norms[available, None].astype(np.float32)
        return Block(values, available)


@dataclass(frozen=True)
class Bags:
    """Bags of rows (the patches of a slide, the slides of a patient), in the order of their first rows. ids: str (n,),
    the bag's value. samples: the rows. members: for every bag the positions of its rows in `samples`."""

    data: DatasetRows
    ids: Objects
    samples: Samples
    members: Sequence[Ints]

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> Objects:
        """A column of the sample table, str or None (n,). Raises UserError as `agreed`."""
        return self.agreed(self.samples.column(name), name)

    @property
    def groups(self) -> Objects:
        """Groups of bags that depend on each other (patients), str (n,). Raises UserError as `agreed`."""
        return self.agreed(self.data.groups(self.samples), self.data.spec.group or "key")

    @property
    def domains(self) -> Objects:
        """Domain of every bag, str (n,). Raises UserError as `agreed`."""
        return self.agreed(self.data.domains(self.samples), self.data.spec.domain or "data set")

    def agreed(self, values: Objects, what: str) -> Objects:
        """Return the value that all rows of a bag have, of one for each row. Raises UserError if they differ."""
        found = np.empty(len(self), dtype=object)
        for i, member in enumerate(self.members):
            first, *others = dict.fromkeys(values[member].tolist())
            if others:
                raise UserError(f"bag {self.ids[i]!r} has rows with {what} {first!r} and {others[0]!r}; expected one")
            found[i] = first
        return found


@dataclass(frozen=True)
class BagFeatures:
    """Features that one model has of bags: in memory when they are small, else read from the map on demand.
    normalized: every vector scaled to unit length, before means are taken and heads are trained."""

    bags: Bags
    features: Features
    tower: Tower
    normalized: bool

    def patches(self, bag: int, positions: Ints | None = None) -> Singles:
        """Return available features of a bag, float32 (p, D), p may be 0, or only of these of its rows, int64."""
        member = self.bags.members[bag]
        wanted = member if positions is None else member[positions]
        if self._in_memory is not None:
            return self._in_memory.values[wanted[self._in_memory.available[wanted]]]
        block = self._read(self.bags.samples.rows[wanted])
        return block.values[block.available]

    @cached_property
    def _in_memory(self) -> Block | None:
        rows = self.bags.samples.rows
        return None if len(rows) * self._read(rows[:1]).values.nbytes > IN_MEMORY_BYTES else self._read(rows)

    def _read(self, rows: Ints) -> Block:
        return self.features.read(self.tower, rows, self.normalized)

    def means(self) -> tuple[Floats, Bools]:
        """Mean feature of every bag, float64 (n, D), NaN where it has none; and which have one, bool (n,)."""
        means = []
        for bag in range(len(self.bags)):
            patches = self.patches(bag).astype(np.float64)
            means.append(patches.mean(axis=0) if len(patches) else np.full(patches.shape[1], np.nan))
        stacked = np.stack(means)
        return stacked, ~np.isnan(stacked[:, 0])


def make_bags(data: DatasetRows, samples: Samples, by: str | None) -> Bags:
    """Put rows with the same value of column `by` into one bag; a row without a value is a bag of its own."""
    units = pa.array(samples.units(by).tolist(), pa.string()).dictionary_encode()  # in the order of first rows
    member = units.indices.to_numpy()
    members = np.split(np.argsort(member, kind="stable").astype(np.int64), np.cumsum(np.bincount(member))[:-1])
    return Bags(data, np.array(units.dictionary.to_pylist(), dtype=object), samples, members)
