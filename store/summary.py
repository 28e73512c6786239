"""Counts of a store: completeness, failures, size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.compute as pc

from mmkd.base.places.remote import in_parallel
from mmkd.store.card import TeacherCard
from mmkd.store.chunk import CRC_BYTES
from mmkd.store.encoding import teacher_arrays
from mmkd.store.layout import sample_part, shard_count
from mmkd.store.ledger import LedgerEntry
from mmkd.store.record import Store, StoreRecord
from mmkd.store.samples import read_samples, sample_dataset


@dataclass(frozen=True)
class TeacherSummary:
    """One teacher's share of a store."""

    shards_done: int
    image_rows: int
    """Rows with a sound image feature."""
    text_rows: int
    """Rows with a sound text feature."""
    bytes: int
    """Bytes of chunks with a ledger entry."""
    digest: str


@dataclass(frozen=True)
class StoreSummary:
    """Counts that `mmkd store info` prints."""

    root: str
    rows: int
    rows_per_shard: int
    shards: int
    corpus: str
    created: str
    status: dict[str, int]
    """Rows by status."""
    reasons: dict[str, int]
    """Failed and partial rows by reason, most frequent first."""
    teachers: dict[str, TeacherSummary]
    sample_bytes: int
    """Bytes of sample parts on disk."""

    @property
    def complete(self) -> bool:
        """True when every shard of every teacher has a ledger entry."""
        return bool(self.teachers) and all(teacher.shards_done == self.shards for teacher in self.teachers.values())


def summarize(
    store: Store,
    teachers: Mapping[str, TeacherCard],
    ledger: Mapping[tuple[int, str], LedgerEntry],
) -> StoreSummary:
    """Count rows, shards, failures and bytes. Reads the ledger and two columns of the sample table. Raises
    CorruptStoreError if the sample table cannot be read."""
    shards = shard_count(store.record.rows, store.record.rows_per_shard)
    table = read_samples(store.root, sample_dataset(store), columns=["status", "reason"])
    parts = [store.root / sample_part(shard) for shard in range(shards)]
    return StoreSummary(
        root=str(store.root),
        rows=store.record.rows,
        rows_per_shard=store.record.rows_per_shard,
        shards=shards,
        corpus=", ".join(span.corpus.location for span in store.record.spans()),
        created=store.record.created,
        status=_counts(table["status"]),
        reasons=_counts(table["reason"].drop_null()),
        teachers={slug: _teacher(store.record, card, ledger) for slug, card in teachers.items()},
        sample_bytes=sum(in_parallel(lambda part: part.stat().st_size, parts, store.root)),
    )


def _teacher(record: StoreRecord, card: TeacherCard, ledger: Mapping[tuple[int, str], LedgerEntry]) -> TeacherSummary:
    entries = [entry for (_, slug), entry in ledger.items() if slug == card.slug]
    arrays = teacher_arrays(card.encoding, card.dim)
    shard_bytes = sum(spec.chunk_bytes(record.rows_per_shard) + CRC_BYTES for spec in arrays)
    return TeacherSummary(
        shards_done=len(entries),
        image_rows=sum(entry.image_rows for entry in entries),
        text_rows=sum(entry.text_rows for entry in entries),
        bytes=len(entries) * shard_bytes,
        digest=card.digest,
    )


def _counts(column: object) -> dict[str, int]:
    pairs = pc.value_counts(column).to_pylist()
    return {
        pair["values"]: pair["counts"] for pair in sorted(pairs, key=lambda pair: (-pair["counts"], pair["values"]))
    }
