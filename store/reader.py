"""FeatureStore: read-only access to a store for training, evaluation and inspection."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError, NotAStoreError, StoreError, UserError
from mmkd.base.files import list_folder, walk_files
from mmkd.base.places.remote import RemotePath, StorePath, as_root, in_parallel, name_in
from mmkd.base.process import free_memory
from mmkd.base.text import counted, html_table
from mmkd.store.array import ChunkedArray, DecodedRows, FeatureArray
from mmkd.store.card import TeacherCard, read_card, read_cards
from mmkd.store.encoding import VALID, ArraySpec
from mmkd.store.hierarchy import is_there
from mmkd.store.layout import TOWERS, Tower
from mmkd.store.ledger import LedgerEntry, read_ledger
from mmkd.store.record import Store, StoreRecord, read_record
from mmkd.store.samples import count_samples, in_rows, read_samples, sample_dataset, sample_schema
from mmkd.store.selections import apply_selection, read_selection
from mmkd.store.stored_array import StoredArray
from mmkd.store.verify import VerifyReport, verify

_ROWS_AT_ONCE = 1 << 19
"""A multiple of every size of a shard; captions of so many rows take some 100 MB."""


@dataclass(frozen=True)
class TeacherSummary:
    """One teacher's share of a store: shards with a ledger entry, rows with a sound feature, bytes of chunks."""

    shards_done: int
    shards_asked: int
    """Shards with inputs of the teacher's towers."""
    rows: dict[Tower, int]
    """By tower that the teacher has."""
    bytes: int
    digest: str


@dataclass(frozen=True)
class StoreSummary:
    """Counts of `mmkd store info`: rows by status and reason (most frequent first), bytes of sample parts on disk."""

    root: str
    rows: int
    rows_per_shard: int
    shards: int
    corpus: str
    created: str
    status: dict[str, int]
    reasons: dict[str, int]
    teachers: dict[str, TeacherSummary]
    sample_bytes: int

    @property
    def complete(self) -> bool:
        """True when every shard of every teacher has a ledger entry."""
        found = self.teachers.values()
        return bool(self.teachers) and all(teacher.shards_done == teacher.shards_asked for teacher in found)


class FeatureStore(Store):
    """Features of T teachers for N rows, opened by `FeatureStore.open(path)`: memory-mapped, or, behind a URL, fetched
    by whole chunks (slow for training; `mmkd store pull` first). A row without a ledger entry, or that a tower was not
    asked for, reads as NaN and is not available."""

    def __init__(self, root: StorePath, record: StoreRecord, teachers: dict[str, TeacherCard]) -> None:
        super().__init__(root, record)
        self.teachers = teachers
        """Slug to card, in alphabetical order: the T axis of `available`."""
        self._features: dict[tuple[str, Tower], FeatureArray] = {}
        self._stamp = _stamp(root)

    @classmethod
    def open(cls, path: str | PathLike[str] | RemotePath) -> "FeatureStore":
        """Open the store at `path`, a folder or URL (`s3://`, `gs://`, `az://`, `http(s)://`, `memory://`). Raises
        NotAStoreError, FormatVersionError, CorruptStoreError, UnreachableError; UserError for a bad URL scheme."""
        root = as_root(path)
        return cls(root, read_record(root), read_cards(root))

    def __len__(self) -> int:
        return self.record.rows

    def __repr__(self) -> str:
        return (
            f"FeatureStore({str(self.root)!r}: {counted(len(self), 'row')} in {counted(self.shards, 'shard')}, "
            f"{counted(len(self.teachers), 'teacher')}, {len(self.ledger)}/{self.shards * len(self.teachers)} shards "
            "extracted)"
        )

    def _repr_html_(self) -> str:
        """HTML for notebooks: a table of the teachers. Reads the ledger only; every text from a file is escaped."""
        size = f"{counted(len(self), 'row')} in {counted(self.shards, 'shard')} of {self.record.rows_per_shard:,}"
        title = f"mmkd store {self.root}: {size}"
        header = ("teacher", "width", "encoding", "shards", "images", "captions", "source", "license")
        teachers: list[tuple[str, ...]] = []
        for slug, card in self.teachers.items():
            found = self._teacher_summary(slug)
            rows = (f"{found.rows[tower]:,}" if tower in found.rows else "-" for tower in TOWERS)
            counts = (f"{found.shards_done} of {found.shards_asked}", *rows)
            teachers.append((slug, str(card.dim), card.encoding, *counts, card.source, card.license))
        return html_table(title, header, teachers or [("no teachers yet",)])

    def __getitem__(self, rows: int | Sequence[int] | NDArray[np.integer[Any]]) -> dict[str, Any]:
        """Return one row (negative from the end) or several, as a `torch.utils.data.DataLoader` needs: `row` (int or
        int64 (n,)), and `SLUG/TOWER` for each tower of each teacher: copies (D,) or (n, D), NaN where missing. Raises
        IndexError."""
        numbers = np.asarray(rows, dtype=np.int64)
        if ((numbers < -len(self)) | (numbers >= len(self))).any():
            raise IndexError(f"row {rows} is outside {self.root}, which has {len(self)} rows")
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        towers = [(slug, tower) for slug, card in self.teachers.items() for tower in card.towers]
        picked = {f"{slug}/{tower}": np.array(self.features(slug, tower)[numbers]) for slug, tower in towers}
        return {"row": numbers if np.ndim(numbers) else int(numbers)} | picked

    def __reduce__(self) -> tuple[Callable[[str, StoreRecord], "FeatureStore"], tuple[str, StoreRecord]]:
        """Send a store to another process by its path; it is opened again there, and no feature is copied."""
        return _reopen, (str(self.root), self.record)

    @cached_property
    def ledger(self) -> dict[tuple[int, str], LedgerEntry]:
        """Entries by (shard, slug), read on first use; reopen to see later ones. Raises NotAStoreError if the store is
        gone; CorruptStoreError if an entry cannot be read, or belongs to a teacher without a card."""
        entries = read_ledger(self.root)
        for slug in sorted({slug for _, slug in entries} - self.teachers.keys()):
            if read_card(self.root, slug) is None:  # else it was added since
                raise CorruptStoreError(
                    f"{self.root} has ledger entries of teacher {slug}, but no card: copy teachers/{slug} again, or "
                    "drop the entries with `mmkd store verify --repair`"
                )
        if not entries and isinstance(self.root, Path) and not is_there(self.root / "ledger"):
            packs = ((self.root / VALID.pack(slug, 0)).parent for slug in self.teachers)
            if found := next((name_in(self.root, folder) for folder in packs if list_folder(folder)), None):
                raise CorruptStoreError(
                    f"{self.root} was not copied whole: it has {found} and no folder ledger, which says what is in it; "
                    "copy it again, or delete teachers/ and extract again"
                )
        self._refuse_replaced(entries)
        return entries

    def _refuse_replaced(self, entries: dict[tuple[int, str], LedgerEntry]) -> None:
        """Raise StoreError if another store is at `root` than was opened (of its ledger `entries` are known)."""
        try:
            stamp = _stamp(self.root)
        except FileNotFoundError:
            raise NotAStoreError(f"{self.root} is not there any more; was it moved or deleted?") from None
        if stamp == self._stamp:
            return
        now = read_ledger(self.root)
        same = stamp[0] == self._stamp[0] and self.record.is_start_of(read_record(self.root))
        cards = {slug: read_card(self.root, slug) for slug in self.teachers}
        same &= all(card is not None and card.digest == self.teachers[slug].digest for slug, card in cards.items())
        same &= all(place in now and now[place].same_features(entry) for place, entry in entries.items())
        if not same:
            raise StoreError(f"{self.root} was replaced by another store since it was opened; open it again")
        self._stamp = stamp

    def card(self, slug: str) -> TeacherCard:
        """Return the card of one teacher. Raises UserError, which lists the store's teachers, if it has none."""
        if slug not in self.teachers:
            raise UserError(f"{self.root} has no teacher {slug!r}; it has {', '.join(self.teachers) or 'none'}")
        return self.teachers[slug]

    def having(self, slugs: Sequence[str], tower: Tower) -> tuple[str, ...]:
        """Return those of some teachers that have a tower."""
        return tuple(slug for slug in slugs if tower in self.card(slug).towers)

    def image(self, slug: str) -> FeatureArray:
        """Return the image features of one teacher: (N, D), read-only, NaN where missing; see `FeatureArray`."""
        return self.features(slug, "image")

    def text(self, slug: str) -> FeatureArray:
        return self.features(slug, "text")

    def features(self, slug: str, tower: Tower) -> FeatureArray:
        """Return the features of one tower as `image` does. Raises UserError if the teacher has no such tower."""
        if (slug, tower) not in self._features:
            values, *scales = (self.array(slug, spec) for spec in self.card(slug).tower_arrays(tower))
            opened: FeatureArray = values.open()
            if scales:
                opened = DecodedRows(opened, scales[0].open() if self.cache is not None else scales[0].load())
            # Concurrent first threads may open it twice; all use one of the two.
            self._features.setdefault((slug, tower), opened)
        return self._features[slug, tower]

    def valid(self, slug: str) -> NDArray[np.uint8]:
        """Return soundness bits of one teacher, uint8 (N,): `IMAGE_SOUND` | `TEXT_SOUND`; 0 without a ledger entry."""
        self.card(slug)
        return self.array(slug, VALID).load()

    def available(self, selection: str | None = None) -> NDArray[np.bool_]:
        """Return where teachers, T in the order of `teachers`, have sound features of all their towers: bool (N, T);
        only where `selection` keeps the pair, for teachers with both towers (it judges no other). Raises as
        `read_selection` and `apply_selection`."""
        if not self.teachers:
            return np.zeros((len(self), 0), dtype=bool)
        sound = np.stack([self.valid(slug) == card.all_sound for slug, card in self.teachers.items()], axis=1)
        if selection is not None:
            chosen, judged = read_selection(self, selection), [card.towers == TOWERS for card in self.teachers.values()]
            digests = {slug: card.digest for slug, card in self.teachers.items() if card.towers == TOWERS}
            sound[:, judged] = apply_selection(chosen, digests, sound[:, judged])
        return sound

    @property
    def samples(self) -> pads.Dataset:
        """The sample table, one row per grid row in order: a `pyarrow.dataset.Dataset` over the Parquet parts. Raises
        StoreError if another store is at `root` by now."""
        self._refuse_replaced(self.__dict__.get("ledger", {}))
        return sample_dataset(self)

    def sample_table(self, columns: list[str] | None = None, filter: pads.Expression | None = None) -> pa.Table:  # noqa: A002
        """Return rows of the sample table in grid order. Raises UserError, which lists the store's columns, for an
        unknown one; CorruptStoreError if a part is missing or damaged."""
        known = sample_schema(self.record.labels).names
        for column in columns or ():
            if column not in known:
                raise UserError(f"{self.root} has no sample column {column!r}; it has {', '.join(known)}")
        with suppress(CorruptStoreError):  # perhaps of parts that were folded since they were listed
            return read_samples(self.root, self.samples, columns=columns, filter=filter).combine_chunks()
        return read_samples(self.root, self.samples, columns=columns, filter=filter).combine_chunks()

    def sample_tables(self, columns: list[str], filter: pads.Expression | None = None) -> Iterator[pa.Table]:  # noqa: A002
        """Yield the same rows, those of some shards at a time, so that memory does not grow with the store."""
        for first in range(0, self.shards * self.record.rows_per_shard, _ROWS_AT_ONCE):
            rows = in_rows(range(first, first + _ROWS_AT_ONCE))
            yield self.sample_table(columns, rows if filter is None else filter & rows)

    def verify(self, deep: bool = False, sample: int | None = None, seed: int = 0) -> VerifyReport:
        """See `mmkd.store.verify.verify`."""
        return verify(self.root, deep, sample, seed)

    def summary(self) -> StoreSummary:
        """Count rows, shards, failures and bytes. Reads the ledger and two columns of the sample table. Raises
        CorruptStoreError if the sample table cannot be read."""
        self._refuse_replaced(self.__dict__.get("ledger", {}))
        counts = count_samples(self)
        parts = walk_files(self.root / "samples", "*.parquet")
        return StoreSummary(
            root=str(self.root),
            rows=len(self),
            rows_per_shard=self.record.rows_per_shard,
            shards=self.shards,
            corpus=", ".join(span.corpus.location for span in self.record.spans()),
            created=self.record.created,
            status=counts["status"],
            reasons=counts["reason"],
            teachers={slug: self._teacher_summary(slug) for slug in self.teachers},
            sample_bytes=sum(in_parallel(lambda part: part.stat().st_size, parts, self.root)),
        )

    def _teacher_summary(self, slug: str) -> TeacherSummary:
        card = self.teachers[slug]
        entries = [entry for (_, teacher), entry in self.ledger.items() if teacher == slug]
        sizes = {spec: spec.chunk_bytes(self.record.rows_per_shard) for spec in card.arrays}
        return TeacherSummary(
            shards_done=len(entries),
            shards_asked=len(self.record.asked_shards(card)),
            rows={tower: sum(entry.sound_rows(tower) for entry in entries) for tower in card.towers},
            bytes=sum(size for entry in entries for spec, size in sizes.items() if entry.crc32c(spec)),
            digest=card.digest,
        )

    def array(self, slug: str, spec: ArraySpec) -> ChunkedArray:
        """Return one array of `TeacherCard.arrays` as stored in files, chunk by chunk."""
        self._refuse_replaced(self.ledger)
        entries = (self.ledger.get((shard, slug)) for shard in range(self.shards))
        checksums = tuple(entry.crc32c(spec) if entry else "" for entry in entries)
        # `valid` is read once, when a run begins: a hundred thousand small files.
        cache = None if spec == VALID else self.cache
        return ChunkedArray(StoredArray(self, slug, spec), len(self), checksums, self._fits_in_memory, cache)

    @cached_property
    def _fits_in_memory(self) -> bool:
        specs = [spec for card in self.teachers.values() for spec in card.arrays]
        return 2 * sum(spec.chunk_bytes(self.record.rows_per_shard) for spec in specs) * self.shards <= free_memory()


def _stamp(root: StorePath) -> tuple[object, ...]:
    """Return what changes when another folder, or another record, is put at `root`."""
    if isinstance(root, RemotePath):
        return "", (root / "zarr.json").stat().stamp
    folder, record = root.stat(), (root / "zarr.json").stat()
    return (folder.st_dev, folder.st_ino), record.st_ino, record.st_mtime_ns, record.st_size


def _reopen(path: str, record: StoreRecord) -> FeatureStore:
    store = FeatureStore.open(path)
    if not record.is_start_of(store.record):
        raise StoreError(f"{path} was replaced by another store since it was opened; open it again")
    return store
