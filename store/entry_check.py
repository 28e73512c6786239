"""One ledger entry against everything it vouches for: the card, the sample part, every byte of its chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.store.card import TeacherCard
from mmkd.store.encoding import VALID, ArraySpec, decode_rows
from mmkd.store.layout import SOUND_BIT, sample_part
from mmkd.store.ledger import LedgerEntry
from mmkd.store.record import Store
from mmkd.store.stored_array import StoredArray


class EntryCheck:
    """Judges entries of a store. samples: SHA-256 of the sample parts, by shard; deep: also look at the values."""

    def __init__(self, store: Store, samples: Mapping[int, str], deep: bool) -> None:
        self.store, self.samples, self.deep = store, samples, deep
        self._arrays: dict[tuple[str, str], StoredArray] = {}

    def array(self, slug: str, spec: ArraySpec) -> StoredArray:
        """Return the files of one array; what was looked up of them is kept."""
        return self._arrays.setdefault((slug, spec.name), StoredArray(self.store, slug, spec))

    def faults(self, card: TeacherCard, entry: LedgerEntry) -> Iterator[tuple[str, str]]:
        """Judge one shard of one teacher: yield file ('' for the entry itself) and fault."""
        record = self.store.record
        if not 0 <= entry.shard < self.store.shards:
            yield "", f"vouches for shard {entry.shard}, the store has {self.store.shards}"
            return
        if card.digest != entry.teacher_digest:
            yield "", f"made with teacher digest {entry.teacher_digest}, the card says {card.digest}"
        rows = len(record.shard_rows(entry.shard))
        if entry.rows != rows:
            yield "", f"vouches for {entry.rows} rows, the shard has {rows}"
        if entry.shard in self.samples and self.samples[entry.shard] != entry.samples_sha256:
            yield sample_part(entry.shard), "not the sample rows that these features were made from"
        asked = record.asked_towers(entry.shard, card)
        if not asked or not entry.fits(card.encoding, asked):
            yield "", f"its members are not those of a shard of {' and '.join(asked) or 'no tower'} in {card.encoding}"
            return
        stored = self.array(card.slug, VALID)
        file = stored.file(entry.shard)
        try:
            valid = stored.read(entry.shard, entry.crc32c(VALID))
        except CorruptStoreError as error:
            yield file, str(error)
            return
        if (valid & ~np.uint8(sum(SOUND_BIT[tower] for tower in asked))).any() or valid[rows:].any():
            yield file, f"marks something else than {' and '.join(asked)} of this shard's rows"
        for tower in asked:
            arrays = [self.array(card.slug, spec) for spec in card.tower_arrays(tower)]
            counted, sound = entry.sound_rows(tower), (valid & SOUND_BIT[tower]) > 0
            first = arrays[0].file(entry.shard)
            if int(sound.sum()) != counted:
                yield first, f"{int(sound.sum())} sound rows, the ledger says {counted}"
            values = []
            for array in arrays:
                try:
                    values.append(array.read(entry.shard, entry.crc32c(array.spec)))
                except CorruptStoreError as error:
                    yield array.file(entry.shard), str(error)
            if self.deep and len(values) == len(arrays):
                yield from ((first, what) for what in _value_faults(decode_rows(values).astype(np.float64), sound))

    def accounted(self, entry: LedgerEntry) -> Iterator[str]:
        """Yield the files that an entry accounts for, loose and packed."""
        for name in ("image", "image_scale", "text", "text_scale", "valid"):
            if getattr(entry, f"{name}_crc32c"):
                spec = ArraySpec(name, "uint8", 1 if name in SOUND_BIT else None)
                yield spec.loose(entry.teacher, entry.shard)
                yield spec.pack(entry.teacher, entry.shard // self.store.record.shards_per_pack)


def _value_faults(values: NDArray[np.float64], sound: NDArray[np.bool_]) -> Iterator[str]:
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(values, axis=1)
    if bad := np.count_nonzero(sound & ~(np.isfinite(norms) & (norms > 0))):
        yield f"{bad} rows are marked sound but are zero or not finite"
    if filled := np.count_nonzero(~sound & ~np.isnan(values).all(axis=1)):
        yield f"{filled} rows are not marked sound but hold values; missing rows hold NaN"
