"""Features of chosen rows: float32, of unit length or as stored, and which of them are available."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkd.store import FeatureStore, UserError
from mmkd.store.layout import SOUND_BIT, Tower


@dataclass(frozen=True)
class Block:
    """Features of n rows. values: float32 (n, D), of unit length or as stored; NaN where not available, so that misuse
    shows. available: bool (n,)."""

    values: NDArray[np.float32]
    available: NDArray[np.bool_]


class Features:
    """Features of one model, or an ensemble, in one store. An ensemble's feature is the concatenation of its members'
    unit features, scaled to unit length: its cosine is the mean of the members' cosines. Without normalization it is
    the bare concatenation."""

    def __init__(
        self, store: FeatureStore, model: str, members: tuple[str, ...] = (), beside: tuple[Features, ...] = ()
    ) -> None:
        self.store = store
        self.model = model
        self.members = members or (model,)
        """The encoders behind the name: one for a model, several for an ensemble."""
        self.beside = beside
        """Models without whose features a row counts as not available here either."""
        for slug in self.members:
            store.card(slug)

    def images(self, rows: NDArray[np.int64], *, normalized: bool = True) -> Block:
        """Image features of these grid rows, members joined; as stored where not `normalized`."""
        return self._joined("image", rows, normalized)

    def texts(self, rows: NDArray[np.int64], *, normalized: bool = True) -> Block:
        """Return caption features of these grid rows, members joined; as stored where not `normalized`."""
        return self._joined("text", rows, normalized)

    def each_member(self) -> tuple[Features, ...]:
        """Return every member on its own, for tasks that join scores instead of features."""
        return tuple(Features(self.store, slug, beside=self.beside) for slug in self.members)

    def digest(self, rows: NDArray[np.int64]) -> str:
        """Return 16 hex digits that change when a feature of these rows may have changed. Taken from the ledger:
        teacher digests and checksums of the shards that hold the rows."""
        shards = np.unique(rows // self.store.record.rows_per_shard).tolist()
        sha = hashlib.sha256()
        for slug in self.members:
            for shard in shards:
                entry = self.store.ledger.get((shard, slug))
                found = (
                    "nothing"
                    if entry is None
                    else f"{entry.teacher_digest} {entry.image_crc32c} {entry.text_crc32c} {entry.valid_crc32c}"
                )
                sha.update(f"{slug} {shard} {found}\n".encode())
        return sha.hexdigest()[:16]

    def _joined(self, tower: Tower, rows: NDArray[np.int64], normalized: bool) -> Block:
        blocks = [_read_block(self.store, slug, tower, rows, normalized) for slug in self.members]
        others = [other._joined(tower, rows, normalized) for other in self.beside]
        available = np.logical_and.reduce([block.available for block in (*blocks, *others)])
        values = np.concatenate([block.values for block in blocks], axis=1)
        if len(blocks) > 1 and normalized:
            values *= np.float32(1 / np.sqrt(len(blocks)))
        values[~available] = np.nan
        return Block(values, available)


def _read_block(store: FeatureStore, slug: str, tower: Tower, rows: NDArray[np.int64], normalized: bool) -> Block:
    if len(rows) and (rows.min() < 0 or rows.max() >= len(store)):
        raise UserError(f"row {rows.max()} is outside {store.root}, which has {len(store)} rows; extract it again")
    values = np.asarray(store.features(slug, tower)[rows], dtype=np.float32)
    norms = np.sqrt(np.square(values, dtype=np.float32).sum(axis=1, dtype=np.float64))
    sound = (store.valid(slug)[rows] & SOUND_BIT[tower]) != 0
    available = sound & np.isfinite(norms) & (norms > 0)
    found = np.full_like(values, np.nan)
    length = norms[available, None].astype(np.float32) if normalized else np.float32(1)
    found[available] = values[available] / length
    return Block(found, available)
