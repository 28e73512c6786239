"""Fold a store: loose chunks into packs, loose ledger entries into few files. The bytes depend on what is finished
alone. A kill at any moment leaves a sound store: a pack is in place before its loose chunks go, a folded entry before
its loose one goes, and folding again does the rest."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import remove_file, write_parts_atomically
from mmkd.store.card import read_cards
from mmkd.store.ledger import fold_entries, read_ledger
from mmkd.store.record import Store
from mmkd.store.stored_array import StoredArray, encode_index


@dataclass
class FoldReport:
    """Packs written, entries folded, and why packs could not be written."""

    packs: int = 0
    entries: int = 0
    damaged: list[str] = field(default_factory=list)


def fold(store: Store, progress: Callable[[int, int], None] = lambda done, every: None) -> FoldReport:
    """Pack the chunks of all finished shards, then fold their entries. A chunk that is not what the ledger vouches for
    stays as it is, with its whole pack. `progress` takes packs done, and all of them. The caller holds the store's
    lock. Raises CorruptStoreError as `read_ledger`; StoreError if the store cannot be written."""
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
    report.entries = fold_entries(store.root)
    return report


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
