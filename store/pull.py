"""Copy a store, or a part of it, to disk: every file is checked against the ledger before it counts. A part is a sound
store: shards that are left out have no entry. All sample rows are copied, the training inputs of the chosen shards, and
every selection whose teachers are all copied."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from mmkd.base.errors import CorruptStoreError, StoreError, UserError
from mmkd.base.files import write_atomically
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath
from mmkd.store.card import TeacherCard
from mmkd.store.chunk import encode_chunk
from mmkd.store.encoding import ArraySpec
from mmkd.store.fold import fold
from mmkd.store.hierarchy import group_document, write_document
from mmkd.store.inputs import InputsEntry, checked_inputs, put_inputs, read_inputs_ledger
from mmkd.store.layout import sample_part
from mmkd.store.ledger import LedgerEntry, read_ledger, remove_entry, unfold_entries, write_entry
from mmkd.store.reader import FeatureStore
from mmkd.store.record import Store, read_record
from mmkd.store.samples import decode_part, part_bytes
from mmkd.store.selections import read_selection, selection_names, write_selection
from mmkd.store.stored_array import StoredArray
from mmkd.store.writer import add_teacher, refuse_strangers


@dataclass(frozen=True)
class PullReport:
    """Rows of the store, what was copied (sample parts, shards, ...), and shards that were present before."""

    rows: int
    parts: int
    shards: int
    present: int
    inputs: int
    selections: int
    bytes: int


def shard_range(text: str, shards: int) -> range:
    """Read `FIRST:END` (END not included, both optional) or one number. Raises UserError if it holds no shard."""
    first, colon, end = text.partition(":")
    try:
        low = int(first or 0)
        high = int(end) if end else shards if colon else low + 1
    except ValueError:
        raise UserError(f"--shards {text!r} is not FIRST:END, for example 0:10") from None
    chosen = range(low, min(high, shards))
    if low < 0 or not chosen:
        raise UserError(f"--shards {text} holds no shard: the store has shards 0 to {shards - 1}")
    return chosen


def pull(
    source: FeatureStore,
    out: Path,
    *,
    teachers: Iterable[str] | None = None,
    shards: range | None = None,
    inputs: bool = True,
    workers: int,
    progress: Callable[[int, int], None],
) -> PullReport:
    """Copy `source`, or some teachers and shards, to the folder `out`, `workers` files at a time; run again to copy the
    rest. `progress` takes units (files, shards) done and in all. Raises UserError for an unknown teacher; StoreError,
    BusyStoreError if `out` cannot take them; UnreachableError; CorruptStoreError after the rest."""
    cards = [source.card(slug) for slug in (source.teachers if teachers is None else teachers)]
    if not (out / "zarr.json").is_file():
        refuse_strangers(out)
    else:  # the same store, wherever the files of its corpus are
        corpus = source.record.corpus.model_copy(update={"root": (found := read_record(out)).corpus.root})
        if found != source.record.model_copy(update={"corpus": corpus}):
            raise StoreError(f"{out} holds another store than {source.root}; name a new folder")
    with only_writer(out, "mmkd store pull"):
        shards = range(source.shards) if shards is None else shards
        places = ((shard, card.slug) for shard in shards for card in cards)
        wanted = [source.ledger[place] for place in places if place in source.ledger]
        entries = read_inputs_ledger(source.root) if inputs else {}
        selections = _selections(source, {card.slug for card in cards})
        transfer = _Transfer(source, out)
        further = [partial(transfer.inputs, entries[shard]) for shard in shards if shard in entries]
        further += [partial(transfer.selection, name) for name in selections]
        every = source.shards + len(wanted) + len(further)
        with ThreadPoolExecutor(workers, thread_name_prefix="mmkd-pull") as pool:
            samples = [partial(transfer.part, shard) for shard in range(source.shards)]
            parts = _run(pool, samples, lambda done: progress(done, every))
            if not (out / "zarr.json").is_file():
                write_document(out / "zarr.json", group_document(source.record.model_dump(mode="json")))
            for card in cards:
                add_teacher(Store(out, source.record), card)
            there = read_ledger(out)
            lacking = [entry for entry in wanted if there.get((entry.shard, entry.teacher)) != entry]
            unfold_entries(out, {entry.shard for entry in lacking})
            before = every - len(lacking) - len(further)
            work = [partial(transfer.shard, source.card(entry.teacher), entry) for entry in lacking]
            sizes = _run(pool, [*work, *further], lambda done: progress(before + done, every))
        fold(Store(out, source.record))
        chosen = len(sizes) - len(selections)
        return PullReport(
            rows=len(source),
            parts=sum(size > 0 for size in parts),
            shards=len(lacking),
            present=len(wanted) - len(lacking),
            inputs=sum(size > 0 for size in sizes[len(lacking) : chosen]),
            selections=sum(size > 0 for size in sizes[chosen:]),
            bytes=sum(parts) + sum(sizes),
        )


def _selections(source: FeatureStore, slugs: set[str]) -> list[str]:
    """Return selections that judged no teacher that stays behind; one that cannot be read is tried, and named then."""
    names = selection_names(source.root)
    for name in tuple(names):
        with suppress(StoreError):
            if not slugs.issuperset(read_selection(source, name).card.teachers):
                names.remove(name)
    return names


def _run(pool: ThreadPoolExecutor, work: Sequence[Callable[[], int]], done: Callable[[int], None]) -> list[int]:
    """Return results in order. Raises CorruptStoreError for damaged files after everything else was done."""
    futures = [pool.submit(unit) for unit in work]
    results: list[int] = []
    damaged: list[CorruptStoreError] = []
    try:
        for number, future in enumerate(futures, 1):
            try:
                results.append(future.result())
            except CorruptStoreError as error:
                damaged.append(error)
            done(number)
    finally:
        for future in futures:
            future.cancel()
    if damaged:
        more = f" ({len(damaged)} of {len(work)} are damaged)" if len(damaged) > 1 else ""
        raise CorruptStoreError(f"{damaged[0]}{more}; everything else was copied; repair the source and pull again")
    return results


class _Transfer:
    """Copies one file, or one shard of a teacher; each method returns the bytes copied, 0 if present before."""

    def __init__(self, source: FeatureStore, out: Path) -> None:
        self.source, self.root, self.out = source, source.root, out
        self.target = Store(out, source.record)
        self._arrays: dict[tuple[StorePath, str, str], StoredArray] = {}
        self.vouched = {entry.shard: entry.samples_sha256 for entry in source.ledger.values()}

    def part(self, shard: int) -> int:
        """Copy a sample part: its SHA-256 is in the ledger, or, before any teacher, its pages hold CRCs."""
        name = sample_part(shard)
        with suppress(CorruptStoreError):  # brought again
            if _is_part(part_bytes(self.out, shard), self.vouched.get(shard)):
                return 0
        data = part_bytes(self.root, shard)
        if not _is_part(data, self.vouched.get(shard)):
            raise CorruptStoreError(f"{name} is not the sample part that the ledger vouches for")
        write_atomically(self.out / name, data)
        return len(data)

    def shard(self, card: TeacherCard, entry: LedgerEntry) -> int:
        """Copy the chunks of an entry, then the entry. An entry for other bytes is deleted first."""
        remove_entry(self.out, entry.shard, entry.teacher)
        size = sum(self._chunk(spec, entry) for spec in card.arrays if entry.crc32c(spec))
        write_entry(self.out, entry)
        return size

    def inputs(self, entry: InputsEntry) -> int:
        if read_inputs_ledger(self.out).get(entry.shard) == entry:
            with suppress(CorruptStoreError):
                checked_inputs(self.out, entry)
                return 0
        return put_inputs(self.out, entry, checked_inputs(self.root, entry))

    def selection(self, name: str) -> int:
        """Copy a selection; an existing one of this name must be equal."""
        found, target = read_selection(self.source, name), Store(self.out, self.source.record)
        if name in selection_names(self.out):
            if read_selection(target, name).card != found.card:
                raise StoreError(f"{self.out} has another selection {name!r}; delete it there, or pull to a new folder")
            return 0
        write_selection(target, name, found.kept, found.card)
        return found.kept.size

    def _chunk(self, spec: ArraySpec, entry: LedgerEntry) -> int:
        crc, there = entry.crc32c(spec), self._array(self.target, entry.teacher, spec)
        if there.has_file(entry.shard):
            with suppress(CorruptStoreError):  # brought again
                there.read(entry.shard, crc)
                return 0
        data, _ = encode_chunk(self._array(self.source, entry.teacher, spec).read(entry.shard, crc))
        write_atomically(self.out / spec.loose(entry.teacher, entry.shard), data)
        return len(data)

    def _array(self, store: Store, slug: str, spec: ArraySpec) -> StoredArray:
        """Return the files of one array as they were when the first of its chunks was looked for."""
        return self._arrays.setdefault((store.root, slug, spec.name), StoredArray(store, slug, spec))


def _is_part(data: bytes, sha256: str | None) -> bool:
    if sha256 is not None:
        return hashlib.sha256(data).hexdigest() == sha256
    with suppress(OSError, pa.ArrowException):
        decode_part(data)
        return True
    return False
