"""FeatureStore: what training, evaluation and inspection see of a store. Read-only throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from mmkd.store.card import TeacherCard, read_card, teacher_folders
from mmkd.store.chunk import read_body
from mmkd.store.errors import CorruptStoreError, UserError
from mmkd.store.layout import PAIR_SOUND, TOWERS, Tower, feature_chunk, shard_count, valid_chunk
from mmkd.store.ledger import LedgerEntry, read_ledger
from mmkd.store.mapping import can_map, map_chunks
from mmkd.store.notebook import store_table
from mmkd.store.record import StoreRecord, read_record
from mmkd.store.samples import sample_dataset
from mmkd.store.summary import StoreSummary, summarise
from mmkd.store.verify import VerifyReport, verify


class FeatureStore:
    """Features of T teachers for N rows, opened for reading.

    Use `FeatureStore.open(path)`. Arrays are memory-mapped: opening costs milliseconds, and rows are
    read from disk (or the page cache) when they are indexed. A row that no ledger entry vouches for
    reads as NaN and is not available.
    """

    def __init__(self, root: Path, record: StoreRecord, teachers: dict[str, TeacherCard]) -> None:
        self.root = root
        self.record = record
        self.teachers = teachers
        """Slug to card, in alphabetical order: the T axis of `available`."""
        self._features: dict[tuple[str, Tower], NDArray[np.floating[Any]]] = {}

    @classmethod
    def open(cls, path: str | PathLike[str]) -> FeatureStore:
        """Open the store at `path`.

        Raises:
            NotAStoreError, FormatVersionError, CorruptStoreError: see `mmkd.store.errors`.
        """
        root = Path(path)
        record = read_record(root)
        cards = {}
        for slug in teacher_folders(root):
            card = read_card(root, slug)
            if card is not None:
                cards[slug] = card
        return cls(root, record, cards)

    def __len__(self) -> int:
        """Grid rows N."""
        return self.record.rows

    def __repr__(self) -> str:
        done = len(self.ledger)
        every = self.shards * len(self.teachers)
        return (
            f"FeatureStore({str(self.root)!r}: {len(self):,} rows in {self.shards} shards, "
            f"{len(self.teachers)} teachers, {done}/{every} shards extracted)"
        )

    def _repr_html_(self) -> str:
        """The same and more for notebooks: a table of the teachers, everything escaped."""
        return store_table(self)

    def __getitem__(self, rows: int | Sequence[int] | NDArray[np.integer[Any]]) -> dict[str, Any]:
        """Features of one row, or of several in one gather: what a `torch.utils.data.DataLoader` asks for.

        Args:
            rows: a grid row, negative from the end; or a list or int array (n,) of them.

        Returns:
            `row` (int or int64 (n,)), and `SLUG/image`, `SLUG/text` for each teacher: (D,) or (n, D), copies that
            may be written to; NaN where missing.

        Raises:
            IndexError: a row that the store does not have.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if ((numbers < -len(self)) | (numbers >= len(self))).any():
            raise IndexError(f"row {rows} is outside {self.root}, which has {len(self)} rows")
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        picked = {
            f"{slug}/{tower}": np.array(self._array(slug, tower)[numbers]) for slug in self.teachers for tower in TOWERS
        }
        return {"row": numbers if np.ndim(numbers) else int(numbers)} | picked

    def __reduce__(self) -> tuple[Callable[[str], FeatureStore], tuple[str]]:
        """A store travels to another process by its path, and is opened again there: no feature is copied."""
        return FeatureStore.open, (str(self.root),)

    @property
    def shards(self) -> int:
        """Shards of the grid."""
        return shard_count(self.record.rows, self.record.rows_per_shard)

    @cached_property
    def ledger(self) -> dict[tuple[int, str], LedgerEntry]:
        """Entries by (shard, slug), read once when the store is opened; reopen to see later ones."""
        return read_ledger(self.root)

    def card(self, slug: str) -> TeacherCard:
        """The card of one teacher.

        Raises:
            UserError: it is not in this store; the message lists those that are.
        """
        try:
            return self.teachers[slug]
        except KeyError:
            raise UserError(
                f"{self.root} has no teacher {slug!r}; it has {', '.join(self.teachers) or 'none'}"
            ) from None

    def image(self, slug: str) -> NDArray[np.floating[Any]]:
        """Image features of one teacher: (N, D) in its card's encoding, mapped, read-only, NaN where missing."""
        return self._array(slug, "image")

    def text(self, slug: str) -> NDArray[np.floating[Any]]:
        """Caption features of one teacher: (N, D) in its card's encoding, mapped, read-only, NaN where missing."""
        return self._array(slug, "text")

    def valid(self, slug: str) -> NDArray[np.uint8]:
        """Soundness bits of one teacher, uint8 (N,): `IMAGE_SOUND` | `TEXT_SOUND`; 0 where no ledger vouches."""
        per_shard = self.record.rows_per_shard
        bits = np.zeros((self.shards, per_shard), dtype=np.uint8)
        self.card(slug)
        for shard in range(self.shards):
            if (shard, slug) in self.ledger:
                body = read_body(self.root, valid_chunk(slug, shard), per_shard, self.ledger[shard, slug].valid_crc32c)
                bits[shard] = np.frombuffer(body, dtype=np.uint8)
        return bits.reshape(-1)[: len(self)]

    def available(self, selection: str | None = None) -> NDArray[np.bool_]:
        """Where a teacher has a sound image and a sound text feature: bool (N, T), T in the order of `teachers`.

        With `selection`, only pairs that `selections/<selection>` keeps.

        Raises:
            UserError: no selection of this name, or one made when the store had other rows.
            TeacherMismatchError: it judged other features than the store holds now.
        """
        if not self.teachers:
            return np.zeros((len(self), 0), dtype=bool)
        sound = np.stack([self.valid(slug) & PAIR_SOUND == PAIR_SOUND for slug in self.teachers], axis=1)
        if selection is None:
            return sound
        # Here, as the package builds on this module.
        from mmkd.store.selection.array import read_selection, selected  # noqa: PLC0415

        digests = {slug: card.digest for slug, card in self.teachers.items()}
        return selected(read_selection(self.root, self.record, selection), digests, sound)

    @property
    def samples(self) -> pads.Dataset:
        """The sample table, one row per grid row in order: a `pyarrow.dataset.Dataset` over the Parquet parts."""
        return sample_dataset(self.root, self.record)

    def sample_table(self, columns: list[str] | None = None, filter: pads.Expression | None = None) -> pa.Table:  # noqa: A002
        """Rows of the sample table in grid order, as an Arrow table.

        Raises:
            UserError: a column that the store does not have; the message lists those it has.
        """
        known = self.samples.schema.names
        for column in columns or ():
            if column not in known:
                raise UserError(f"{self.root} has no sample column {column!r}; it has {', '.join(known)}")
        return self.samples.to_table(columns=columns, filter=filter).combine_chunks()

    def verify(self, deep: bool = False) -> VerifyReport:
        """Compare every byte with the ledger that vouches for it; `deep` looks at the values too."""
        return verify(self.root, deep)

    def summary(self) -> StoreSummary:
        """Counts, coverage, failures and bytes."""
        return summarise(self.root, self.record, self.teachers, self.ledger)

    def _array(self, slug: str, tower: Tower) -> NDArray[np.floating[Any]]:
        card = self.card(slug)
        if (slug, tower) not in self._features:
            chunk_bytes = self.record.rows_per_shard * card.dim * np.dtype(card.encoding).itemsize
            load: Callable[[TeacherCard, Tower, int], NDArray[np.uint8]] = (
                self._mapped if can_map(chunk_bytes) else self._copied
            )
            flat = load(card, tower, chunk_bytes).view(np.dtype(card.encoding).newbyteorder("<"))
            # Threads that come first together map it twice, and all go on with one of the two.
            self._features.setdefault((slug, tower), flat.reshape(-1, card.dim)[: len(self)])
        return self._features[slug, tower]

    def _mapped(self, card: TeacherCard, tower: Tower, chunk_bytes: int) -> NDArray[np.uint8]:
        dtype = np.dtype(card.encoding).newbyteorder("<")
        chunk_values = chunk_bytes // dtype.itemsize
        paths = [
            self.root / feature_chunk(card.slug, tower, shard) if (shard, card.slug) in self.ledger else None
            for shard in range(self.shards)
        ]
        try:
            return map_chunks(paths, chunk_bytes, lambda: np.full(chunk_values, np.nan, dtype=dtype).tobytes())
        except FileNotFoundError as error:
            raise CorruptStoreError(
                f"{error.filename} is missing although the ledger vouches for it; run `mmkd store verify {self.root}`"
            ) from error

    def _copied(self, card: TeacherCard, tower: Tower, chunk_bytes: int) -> NDArray[np.uint8]:
        """The same values read into memory: for widths that do not fill whole pages and systems without mmap."""
        dtype = np.dtype(card.encoding).newbyteorder("<")
        array = np.full((self.shards, chunk_bytes // dtype.itemsize), np.nan, dtype=dtype)
        for shard in range(self.shards):
            entry = self.ledger.get((shard, card.slug))
            if entry is not None:
                name = feature_chunk(card.slug, tower, shard)
                crc = entry.image_crc32c if tower == "image" else entry.text_crc32c
                array[shard] = np.frombuffer(read_body(self.root, name, chunk_bytes, crc), dtype=dtype)
        # Over a read-only buffer: a flag that was merely cleared could be set again.
        flat: NDArray[np.uint8] = np.frombuffer(array.reshape(-1).view(np.uint8).data.toreadonly(), np.uint8)
        return flat
