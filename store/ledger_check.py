"""All that a ledger holds, damaged or not, for verifying and repairing it, and each entry against what it vouches for:
the card, the sample part, every byte of its chunks. Readers refuse what is taken apart here."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import remove_file
from mmkd.base.places.remote import StorePath, name_in
from mmkd.store.card import TeacherCard
from mmkd.store.encoding import VALID, ArraySpec, decode_rows
from mmkd.store.hierarchy import list_part, parse_document
from mmkd.store.layout import SOUND_BIT, folded_entries, ledger_entry, sample_part
from mmkd.store.ledger import FOLDED_FOLDER, LedgerEntry, folded_lines, read_entry, write_folded
from mmkd.store.record import Store
from mmkd.store.stored_array import StoredArray

Place = tuple[int, str]
"""Shard and teacher of an entry."""


@dataclass
class LedgerScan:
    """loose, folded: entries by file. faults: file and what is wrong. disputed: places with two different entries."""

    loose: dict[str, LedgerEntry] = field(default_factory=dict)
    folded: dict[str, list[LedgerEntry]] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    disputed: list[Place] = field(default_factory=list)

    @property
    def files(self) -> set[str]:
        return {*self.loose, *self.folded, *(file for file, _ in self.faults)}

    @property
    def unsure(self) -> set[Place]:
        """Places whose entry lies in a file that was cut or changed."""
        damaged = {file for file, _ in self.faults} & self.folded.keys()
        return {entry.place for file in damaged for entry in self.folded[file]}

    def entries(self) -> list[LedgerEntry]:
        """Return one entry for each place, the loose one where there are two, in order of shards."""
        every = (*(entry for some in self.folded.values() for entry in some), *self.loose.values())
        found = {entry.place: entry for entry in every}
        return [found[place] for place in sorted(found)]


def scan_ledger(root: StorePath) -> LedgerScan:
    """Read every entry that can be read. Raises as `list_part`."""
    scan = LedgerScan()
    for path in list_part(root, "ledger", "*.json"):
        try:
            scan.loose[name_in(root, path)] = read_entry(path)
        except CorruptStoreError as error:
            scan.faults.append((name_in(root, path), str(error)))
    known = {entry.place: entry for entry in scan.loose.values()}
    for path in list_part(root, FOLDED_FOLDER, "*.jsonl"):
        file = name_in(root, path)
        try:
            lines, whole = folded_lines(path)
        except CorruptStoreError as error:
            scan.faults.append((file, str(error)))
            continue
        scan.folded[file] = []
        if not whole:
            scan.faults.append((file, "was cut or changed after it was written"))
        for line in lines:
            try:
                entry = parse_document(LedgerEntry, line, path)
            except CorruptStoreError as error:
                scan.faults.append((file, str(error)))
                continue
            if folded_entries(entry.shard) != file:
                scan.faults.append((file, f"holds an entry of shard {entry.shard}, which belongs elsewhere"))
                continue
            if known.setdefault(entry.place, entry) != entry:
                scan.disputed.append(entry.place)
            scan.folded[file].append(entry)
    return scan


def drop_entries(root: StorePath, doomed: Collection[Place]) -> list[str]:
    """Delete the entries of these places, loose or folded, and those that cannot be read; return a line for each.
    Raises StoreError if the ledger cannot be written."""
    scan, done = scan_ledger(root), []
    damaged = {file for file, _ in scan.faults}
    for file, entries in scan.folded.items():
        kept = [entry for entry in entries if entry.place not in doomed]
        if len(kept) < len(entries) or file in damaged:
            write_folded(root / file, kept)
            done += [f"dropped {ledger_entry(*entry.place)} from {file}" for entry in entries if entry not in kept]
            done += [f"wrote {file} again"] if file in damaged else []
    loose = (file for file, entry in scan.loose.items() if entry.place in doomed)
    for file in sorted({*(damaged - scan.folded.keys()), *loose}):
        remove_file(root / file)
        done.append(f"dropped {file}")
    return done


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
