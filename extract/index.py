"""The index: every input gets its grid row before anything is decoded."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmkd.extract.corpora import Corpus, CorpusRow
from mmkd.store.atomic import disk_errors
from mmkd.store.errors import CorpusError
from mmkd.store.layout import sample_part, shard_count
from mmkd.store.record import CorpusRecord, StoreRecord
from mmkd.store.remote import StorePath
from mmkd.store.samples import sample_schema, write_part
from mmkd.store.writer import create_store

_BATCH = 65536


def create_indexed_store(corpus: Corpus, root: StorePath) -> StoreRecord:
    """List the corpus and lay an empty store over it.

    A key that occurs again is kept as a failed row that names the first one: nothing else is lost.

    Raises:
        CorpusError: the corpus has no rows, or cannot be read.
        StoreError: the store cannot be written.
    """
    with _indexed(corpus) as index:
        record = CorpusRecord(
            kind=corpus.kind,
            location=corpus.location,
            root=str(corpus.root),
            rows=len(index),
            labels=corpus.labels,
            digest=corpus.digest(),
        )
        return create_store(root, record, index)


def restore_parts(corpus: Corpus, root: StorePath, record: StoreRecord) -> int:
    """List the corpus again for sample parts that are missing (`mmkd store verify --repair` drops damaged ones).

    Returns:
        Parts that were written; their rows are pending.

    Raises:
        CorpusError, StoreError: as `create_indexed_store`.
    """
    per_shard = record.rows_per_shard
    shards = range(shard_count(record.rows, per_shard))
    missing = [shard for shard in shards if not (root / sample_part(shard)).is_file()]
    if missing:
        with _indexed(corpus) as index:
            for shard in missing:
                write_part(root, shard, index.slice(shard * per_shard, per_shard).combine_chunks())
    return len(missing)


@contextmanager
def _indexed(corpus: Corpus) -> Iterator[pa.Table]:
    """The corpus as a table in grid order, mapped from a temporary file: it may be larger than memory."""
    with tempfile.TemporaryDirectory(prefix="mmkd-index-") as folder:
        # Spooled to a file and mapped back: the number of rows decides the shards, and is known last.
        spool = Path(folder) / "index.arrow"
        if not _spool(corpus, corpus.labels, spool):
            raise CorpusError(f"corpus {corpus.location} is empty: no image or caption was found in it")
        with pa.memory_map(str(spool)) as source:
            yield pa.ipc.open_stream(source).read_all()


def check_same_corpus(corpus: Corpus, record: StoreRecord, root: StorePath) -> None:
    """Refuse to go on with a store of another corpus.

    Raises:
        CorpusError: the corpus' index files are not those that the store was made from.
    """
    if corpus.digest() != record.corpus.digest:
        raise CorpusError(
            f"{root} was made from {record.corpus.location} as it was on {record.created}; {corpus.location} differs "
            "from that; name a new store, or bring the old corpus back"
        )


def _spool(corpus: Corpus, labels: tuple[str, ...], spool: Path) -> int:
    schema = sample_schema(labels)
    seen: dict[bytes, int] = {}
    count = 0
    rows = corpus.rows()
    with disk_errors(spool), pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(_record_batch(_judged(batch, count, seen), labels, schema))
            count += len(batch)
    return count


def _judged(
    batch: list[CorpusRow], first: int, seen: dict[bytes, int]
) -> Iterator[tuple[int, CorpusRow, str, str | None]]:
    """Row number, input, status and reason; `seen` maps key hashes (16 bytes each, not the keys) to rows."""
    for number, row in enumerate(batch, first):
        digest = hashlib.blake2b(row.key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        earlier = seen.setdefault(digest, number)
        if earlier != number:
            yield number, row, "failed", f"key: duplicate of row {earlier}"
        elif row.uri is None and not row.caption:
            yield number, row, "failed", "key: neither image nor caption"
        else:
            yield number, row, "pending", None


def _record_batch(
    judged: Iterator[tuple[int, CorpusRow, str, str | None]], labels: tuple[str, ...], schema: pa.Schema
) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for number, row, status, reason in judged:
        values: dict[str, Any] = {
            "row": number,
            "key": _printable(row.key),
            "caption": row.caption,
            "modality": row.modality,
            "uri": row.uri,
            "offset": row.offset,
            "length": row.length,
            "status": status,
            "reason": reason,
        }
        values.update((label, row.labels.get(label)) for label in labels)
        for name, column in columns.items():
            column.append(values.get(name))
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _printable(key: str) -> str:
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
