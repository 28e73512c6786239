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
from mmkd.store.append import append_rows, first_new_row, refresh_documents
from mmkd.store.atomic import disk_errors
from mmkd.store.errors import CorpusError
from mmkd.store.layout import sample_part
from mmkd.store.record import CorpusRecord, CorpusSpan, StoreRecord, read_record
from mmkd.store.samples import read_part, sample_schema, write_part
from mmkd.store.writer import create_store

_BATCH = 65536


def create_indexed_store(corpus: Corpus, root: Path) -> StoreRecord:
    """List the corpus and lay an empty store over it.

    A key that occurs again is kept as a failed row that names the first one: nothing else is lost.

    Raises:
        CorpusError: the corpus has no rows, or cannot be read.
        StoreError: the store cannot be written.
    """
    with _indexed(corpus, 0, {}) as index:
        return create_store(root, _corpus_record(corpus, len(index)), index)


def append_corpus(corpus: Corpus, root: Path) -> CorpusSpan:
    """List a further corpus below the rows of a store; its rows are pending until they are extracted.

    A key that the store has already is kept as a failed row that names the first one. Appending a corpus that
    is there already only finishes what an interruption left.

    Raises:
        CorpusError: the corpus has no rows, or cannot be read.
        StoreError: no store at `root`, or it cannot be written.
    """
    record = read_record(root)
    present = corpus_span(corpus, record)
    if present is not None:
        refresh_documents(root, record)
        return present
    first = first_new_row(record)
    with _indexed(corpus, first, _seen_before(root, record, first)) as index:
        return append_rows(root, record, _corpus_record(corpus, len(index)), index).spans()[-1]


def _corpus_record(corpus: Corpus, rows: int) -> CorpusRecord:
    return CorpusRecord(
        kind=corpus.kind,
        location=corpus.location,
        root=str(corpus.root),
        rows=rows,
        labels=corpus.labels,
        digest=corpus.digest(),
    )


def _seen_before(root: Path, record: StoreRecord, end: int) -> dict[bytes, int]:
    """Key hashes of the inputs below grid row `end` (a shard boundary), each with the first row that has the key."""
    seen: dict[bytes, int] = {}
    for shard in range(end // record.rows_per_shard):
        table, _ = read_part(root, shard)
        for number, key in zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True):
            seen.setdefault(_key_hash(key), number)
    return seen


def restore_parts(corpus: Corpus, root: Path, record: StoreRecord) -> int:
    """List the corpus again for sample parts that are missing (`mmkd store verify --repair` drops damaged ones).

    Returns:
        Parts that were written; their rows are pending.

    Raises:
        CorpusError, StoreError: as `create_indexed_store`.
    """
    span = corpus_span(corpus, record)
    missing = [shard for shard in span.shards if not (root / sample_part(shard)).is_file()] if span else []
    if span and missing:
        per_shard, first = record.rows_per_shard, span.rows.start
        with _indexed(corpus, first, _seen_before(root, record, first)) as index:
            for shard in missing:
                write_part(root, shard, index.slice(shard * per_shard - first, per_shard).combine_chunks())
    return len(missing)


@contextmanager
def _indexed(corpus: Corpus, first: int, seen: dict[bytes, int]) -> Iterator[pa.Table]:
    """The corpus as a table from grid row `first` on, mapped from a temporary file: it may be larger than memory."""
    with tempfile.TemporaryDirectory(prefix="mmkd-index-") as folder:
        # Spooled to a file and mapped back: the number of rows decides the shards, and is known last.
        spool = Path(folder) / "index.arrow"
        if not _spool(corpus, first, seen, spool):
            raise CorpusError(f"corpus {corpus.location} is empty: no image or caption was found in it")
        with pa.memory_map(str(spool)) as source:
            yield pa.ipc.open_stream(source).read_all()


def corpus_span(corpus: Corpus, record: StoreRecord) -> CorpusSpan | None:
    """Where a corpus lies in a store's grid; None when it is not in the store."""
    digest = corpus.digest()
    return next((span for span in record.spans() if span.corpus.digest == digest), None)


def check_same_corpus(corpus: Corpus, record: StoreRecord, root: Path) -> None:
    """Refuse to go on with a store that does not hold this corpus.

    Raises:
        CorpusError: the corpus' index files are not those that the store was made from.
    """
    if corpus_span(corpus, record) is None:
        made_from = " and ".join(span.corpus.location for span in record.spans())
        raise CorpusError(
            f"{root} was made from {made_from} as it was on {record.created}; {corpus.location} differs "
            f"from that; name a new store, bring the old corpus back, or add its rows with `mmkd store append {root} "
            f"{corpus.location}`"
        )


def _spool(corpus: Corpus, first: int, seen: dict[bytes, int], spool: Path) -> int:
    labels = corpus.labels
    schema = sample_schema(labels)
    count = 0
    rows = corpus.rows()
    with disk_errors(spool), pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(_record_batch(_judged(batch, first + count, seen), labels, schema))
            count += len(batch)
    return count


def _judged(
    batch: list[CorpusRow], first: int, seen: dict[bytes, int]
) -> Iterator[tuple[int, CorpusRow, str, str | None]]:
    """Row number, input, status and reason; `seen` maps key hashes (16 bytes each, not the keys) to rows."""
    for number, row in enumerate(batch, first):
        # The key as it is stored: two that differ only in bytes that cannot be stored are one key.
        earlier = seen.setdefault(_key_hash(_printable(row.key)), number)
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


def _key_hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _printable(key: str) -> str:
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
