"""Fold a store: loose chunks into packs, sample parts and loose ledger entries into few files. The bytes depend on what
is finished alone. A kill at any moment leaves a sound store: a pack or folded file is in place before what is in it
goes, and folding again does the rest."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import remove_file, write_parts_atomically
from mmkd.store.card import read_cards
from mmkd.store.folded_parts import folded_end
from mmkd.store.layout import FOLDED_PARTS, folded_parts, sample_part
from mmkd.store.ledger import LedgerEntry, fold_entries, read_ledger
from mmkd.store.record import Store
from mmkd.store.samples import PartFiles, part_bytes
from mmkd.store.stored_array import StoredArray, encode_index


@dataclass
class FoldReport:
    """Packs written, entries folded, and why packs or files of parts could not be written."""

    packs: int = 0
    entries: int = 0
    damaged: list[str] = field(default_factory=list)


def fold(store: Store, progress: Callable[[int, int], None] = lambda done, every: None) -> FoldReport:
    """Pack the chunks of all finished shards, then fold their sample parts and entries. What the ledger does not vouch
    for stays as it is, with its whole pack or all 64 parts. `progress` takes packs done, and all of them. The caller
    holds the store's lock. Raises CorruptStoreError as `read_ledger`; StoreError if the store cannot be written."""
    report, ledger = FoldReport(), read_ledger(store.root)
    work: list[tuple[StoredArray, int, Mapping[int, str]]] = []
    for slug, card in read_cards(store.root).items():
        entries = {shard: entry for (shard, teacher), entry in ledger.items() if teacher == slug}
        for spec in card.arrays:
            checksums = {shard: crc for shard, entry in entries.items() if (crc := entry.crc32c(spec))}
            array = StoredArray(store, slug, spec)
            numbers = sorted({shard // array.per_pack for shard in array.loose if shard in checksums})
            work += [(array, number, checksums) for number in numbers]
    for done, (array, number, vouched) in enumerate(work, 1):
        try:
            _write_pack(array, number, vouched)
            report.packs += 1
        except CorruptStoreError as error:
            report.damaged.append(str(error))
        progress(done, len(work))
    report.damaged += _fold_parts(store, ledger.values())
    report.entries = fold_entries(store.root)
    return report


def _fold_parts(store: Store, entries: Iterable[LedgerEntry]) -> Iterator[str]:
    """Fold the sample parts of neighbors that are all finished, each checked; yield why some could not be."""
    vouched: dict[int, set[str]] = {}
    for entry in entries:
        vouched.setdefault(entry.shard, set()).add(entry.samples_sha256)
    loose = PartFiles(store.root).loose
    for number in sorted({shard // FOLDED_PARTS for shard in loose}):
        shards = range(number * FOLDED_PARTS, (number + 1) * FOLDED_PARTS)
        if vouched.keys() >= set(shards):
            try:
                parts = {shard: part_bytes(store.root, shard) for shard in shards}
                if other := [s for s, data in parts.items() if vouched[s] != {hashlib.sha256(data).hexdigest()}]:
                    raise CorruptStoreError(f"{sample_part(other[0])} is not the part that the ledger vouches for")
                file = store.root / folded_parts(shards[0])
                write_parts_atomically(file, [*parts.values(), folded_end(parts)])
            except CorruptStoreError as error:
                yield str(error)
                continue
            for shard in loose & set(shards):
                remove_file(store.root / sample_part(shard))


def _write_pack(array: StoredArray, number: int, checksums: Mapping[int, str]) -> None:
    """Write one pack anew from the pack that is there and the loose chunks, each checked, then delete these."""
    shards = range(number * array.per_pack, (number + 1) * array.per_pack)

    def parts() -> Iterator[bytes]:
        for shard in shards:
            if shard in checksums:
                yield array.read(shard, checksums[shard]).tobytes()
        yield encode_index([shard in checksums for shard in shards], array.chunk_bytes)

    folded = [shard for shard in shards if shard in array.loose and shard in checksums]
    write_parts_atomically(array.root / array.spec.pack(array.slug, number), parts())
    array.forget()
    for shard in folded:
        remove_file(array.root / array.spec.loose(array.slug, shard))
    if isinstance(array.root, Path):
        with suppress(OSError):  # not empty, or gone
            (array.root / array.spec.loose(array.slug, 0)).parent.rmdir()
