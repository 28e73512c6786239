"""FeatureStore: what training, evaluation and inspection see of a store. Read-only throughout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from mmkd.store.card import TeacherCard
from mmkd.store.chunk import checked_body
from mmkd.store.errors import CorruptStoreError, UserError
from mmkd.store.layout import PAIR_SOUND, Tower, feature_array, feature_chunk, shard_count, valid_chunk
from mmkd.store.ledger import LedgerEntry, read_ledger
from mmkd.store.mapping import can_map, map_chunks
from mmkd.store.record import StoreRecord, read_json, read_record
from mmkd.store.samples import sample_schema
from mmkd.store.summary import StoreSummary, summarise
from mmkd.store.verify import VerifyReport, verify

FLOAT16_BYTES = 2


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
        self._features: dict[tuple[str, Tower], NDArray[np.float16]] = {}

    @classmethod
    def open(cls, path: str | PathLike[str]) -> FeatureStore:
        """Open the store at `path`.

        Raises:
            NotAStoreError, FormatVersionError, CorruptStoreError: see `mmkd.store.errors`.
        """
        root = Path(path)
        record = read_record(root)
        cards = {}
        for metadata in sorted((root / "teachers").glob("*/zarr.json")):
            attributes = read_json(metadata).get("attributes", {}).get("mmkd")
            if attributes is not None:  # a group without a card was not created to the end
                cards[metadata.parent.name] = TeacherCard.from_attributes(attributes)
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

    def image(self, slug: str) -> NDArray[np.float16]:
        """Image features of one teacher: float16 (N, D), memory-mapped, read-only, NaN where missing."""
        return self._array(slug, "image")

    def text(self, slug: str) -> NDArray[np.float16]:
        """Caption features of one teacher: float16 (N, D), memory-mapped, read-only, NaN where missing."""
        return self._array(slug, "text")

    def valid(self, slug: str) -> NDArray[np.uint8]:
        """Soundness bits of one teacher, uint8 (N,): `IMAGE_SOUND` | `TEXT_SOUND`; 0 where no ledger vouches."""
        per_shard = self.record.rows_per_shard
        bits = np.zeros((self.shards, per_shard), dtype=np.uint8)
        self.card(slug)
        for shard in range(self.shards):
            if (shard, slug) in self.ledger:
                path = self.root / valid_chunk(slug, shard)
                body, crc = checked_body(path.read_bytes(), per_shard, str(path))
                if crc != self.ledger[shard, slug].valid_crc32c:
                    raise CorruptStoreError(
                        f"{path} is not what the ledger vouches for; run `mmkd store verify {self.root}`"
                    )
                bits[shard] = np.frombuffer(body, dtype=np.uint8)
        return bits.reshape(-1)[: len(self)]

    def available(self) -> NDArray[np.bool_]:
        """Where a teacher has a sound image and a sound text feature: bool (N, T), T in the order of `teachers`."""
        if not self.teachers:
            return np.zeros((len(self), 0), dtype=bool)
        return np.stack([self.valid(slug) & PAIR_SOUND == PAIR_SOUND for slug in self.teachers], axis=1)

    @property
    def samples(self) -> pads.Dataset:
        """The sample table, one row per grid row in order: a `pyarrow.dataset.Dataset` over the Parquet parts."""
        return pads.dataset(self.root / "samples", schema=sample_schema(self.record.corpus.labels), format="parquet")

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

    def verify(self) -> VerifyReport:
        """Compare every file with the ledger that vouches for it."""
        return verify(self.root, self.record, self.teachers)

    def summary(self) -> StoreSummary:
        """Counts, coverage, failures and bytes."""
        return summarise(self.root, self.record, self.teachers, self.ledger)

    def _array(self, slug: str, tower: Tower) -> NDArray[np.float16]:
        card = self.card(slug)
        if (slug, tower) not in self._features:
            chunk_bytes = self.record.rows_per_shard * card.dim * FLOAT16_BYTES
            load: Callable[[TeacherCard, Tower, int], NDArray[np.uint8]] = (
                self._mapped if can_map(chunk_bytes) else self._copied
            )
            flat = load(card, tower, chunk_bytes).view("<f2")
            self._features[slug, tower] = flat.reshape(-1, card.dim)[: len(self)]
        return self._features[slug, tower]

    def _mapped(self, card: TeacherCard, tower: Tower, chunk_bytes: int) -> NDArray[np.uint8]:
        paths = [
            self.root / feature_chunk(card.slug, tower, shard) if (shard, card.slug) in self.ledger else None
            for shard in range(self.shards)
        ]
        filler = np.full(chunk_bytes // FLOAT16_BYTES, np.nan, dtype="<f2").tobytes()
        try:
            return map_chunks(paths, chunk_bytes, filler)
        except FileNotFoundError as error:
            raise CorruptStoreError(
                f"{error.filename} is missing although the ledger vouches for it; run `mmkd store verify {self.root}`"
            ) from error

    def _copied(self, card: TeacherCard, tower: Tower, chunk_bytes: int) -> NDArray[np.uint8]:
        """The same values read into memory: for widths that do not fill whole pages and systems without mmap."""
        import zarr  # noqa: PLC0415 - 0.3 s that the mapped path does not need

        array = np.full((self.shards, chunk_bytes // FLOAT16_BYTES), np.nan, dtype="<f2")
        stored = zarr.open_array(self.root / feature_array(card.slug, tower), mode="r")
        per_shard = self.record.rows_per_shard
        for shard in range(self.shards):
            if (shard, card.slug) in self.ledger:
                values = stored[shard * per_shard : (shard + 1) * per_shard]
                array[shard, : values.size] = np.asarray(values).reshape(-1)
        flat = array.reshape(-1).view(np.uint8)
        flat.flags.writeable = False
        return flat
