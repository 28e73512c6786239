"""The index: every input gets its grid row before anything is decoded.

Parts of a corpus (tars, Parquet files, folders) are listed in parallel, each into a file of its own; these are
read back in order, numbered, and judged. Memory does not grow with the corpus: all of it lies in temporary files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.extract.corpora import Corpus, Part, corpus_digest
from mmkd.extract.corpus_parts import what_changed, write_parts
from mmkd.extract.duplicates import find_duplicates
from mmkd.extract.listing import HASH, listing_schema, row_batch
from mmkd.store.atomic import disk_errors
from mmkd.store.errors import CorpusError
from mmkd.store.layout import sample_part, shard_count
from mmkd.store.place import Place
from mmkd.store.record import CorpusRecord, StoreRecord
from mmkd.store.samples import sample_schema, write_part
from mmkd.store.writer import create_store

_BATCH = 8192
# Listing is Python work, so processes share it; below this a process costs more to start than it saves.
_BYTES_WORTH_PROCESSES = 1 << 30


def create_indexed_store(corpus: Corpus, root: Path) -> StoreRecord:
    """List the corpus and lay an empty store over it.

    A key that occurs again is kept as a failed row that names the first one: nothing else is lost.

    Raises:
        CorpusError: the corpus has no rows, or cannot be read.
        StoreError: the store cannot be written.
    """
    parts = corpus.parts()
    with _indexed(corpus, parts) as index:
        record = CorpusRecord(
            kind=corpus.kind,
            location=corpus.location,
            root=str(corpus.root),
            rows=len(index),
            labels=corpus.labels,
            digest=corpus_digest(corpus, parts),
        )
        created = create_store(root, record, index)
    write_parts(root, corpus.settings(), parts)
    return created


def restore_parts(corpus: Corpus, root: Path, record: StoreRecord) -> int:
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
        with _indexed(corpus, corpus.parts()) as index:
            for shard in missing:
                write_part(root, shard, index.slice(shard * per_shard, per_shard).combine_chunks())
    return len(missing)


def check_same_corpus(corpus: Corpus, record: StoreRecord, root: Path) -> None:
    """Refuse to go on with a store of another corpus.

    Raises:
        CorpusError: a file of the corpus has another name, size, change time or hash than when the store was made,
            or is read otherwise; the first difference is named.
    """
    parts = corpus.parts()
    if corpus_digest(corpus, parts) != record.corpus.digest:
        changed = what_changed(root, corpus.settings(), parts)
        raise CorpusError(
            f"{root} was made from {record.corpus.location} as it was on {record.created}; {corpus.location} differs "
            f"from that{f': {changed}' if changed else ''}; name a new store, or bring the old corpus back"
        )


@contextmanager
def _indexed(corpus: Corpus, parts: Sequence[Part]) -> Iterator[pa.Table]:
    """The corpus as a table in grid order, mapped from a temporary file: it may be larger than memory."""
    with tempfile.TemporaryDirectory(prefix="mmkd-index-") as name:
        folder = Path(name)
        listed = list(_list_parts(corpus, parts, folder))
        total = sum(rows for _, rows in listed)
        if not total:
            raise CorpusError(f"corpus {corpus.location} is empty: no image or caption was found in it")
        files = [file for file, _ in listed]
        duplicates = find_duplicates(lambda: _hashes(files), total)
        # Spooled to a file and mapped back: the number of rows decides the shards, and is known last.
        spool = folder / "index.arrow"
        _number(files, duplicates, corpus.labels, spool)
        with pa.memory_map(str(spool)) as source:
            yield pa.ipc.open_stream(source).read_all()


_Job = tuple[Corpus, Part, Path, tuple[str, ...]]


def _list_parts(corpus: Corpus, parts: Sequence[Part], folder: Path) -> Iterator[tuple[Path, int]]:
    """List every part into its own file; yield file and number of rows, in the parts' order."""
    labels = corpus.labels
    jobs: list[_Job] = [(corpus, part, folder / f"{i}.arrow", labels) for i, part in enumerate(parts)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(jobs) > 1 and cores > 1 and sum(part.size for part in parts) > _BYTES_WORTH_PROCESSES:
        # Fresh processes: a fork of a program with threads (Arrow's, Dask's) may stand still for ever.
        with ProcessPoolExecutor(min(cores, len(jobs)), mp_context=get_context("spawn")) as processes:
            yield from processes.map(_list_part, jobs)
        return
    # Threads wait for a network together, and more of them than cores do.
    threads = 16 if Place(str(corpus.root)).remote else cores
    with ThreadPoolExecutor(min(threads, max(1, len(jobs))), thread_name_prefix="mmkd-index") as pool:
        yield from pool.map(_list_part, jobs)


def _list_part(job: _Job) -> tuple[Path, int]:
    corpus, part, file, labels = job
    schema = listing_schema(labels)
    rows = corpus.rows_of(part)
    count = 0
    with disk_errors(file), pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(row_batch(batch, labels, schema))
            count += len(batch)
    return file, count


def _batches(files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader:
            yield from reader


def _hashes(files: Sequence[Path]) -> Iterator[NDArray[np.uint64]]:
    for batch in _batches(files):
        column = batch.column(HASH)
        data = np.frombuffer(column.buffers()[1], dtype=np.uint64)
        yield data[2 * column.offset : 2 * (column.offset + len(column))].reshape(-1, 2)


def _number(files: Sequence[Path], duplicates: dict[int, int], labels: tuple[str, ...], spool: Path) -> None:
    """Write the final index: rows numbered, statuses known before reading set."""
    schema = sample_schema(labels)
    start = 0
    with disk_errors(spool), pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(files):
            rows = range(start, start + len(batch))
            faults = batch.column("reason").to_pylist()
            for row in rows:
                if row in duplicates:
                    faults[row - start] = f"key: duplicate of row {duplicates[row]}"
            columns = {name: batch.column(name) for name in batch.schema.names if name != HASH}
            columns["row"] = pa.array(rows, pa.int64())
            columns["reason"] = pa.array(faults, pa.string())
            columns["status"] = pa.array([_status(fault) for fault in faults], pa.string())
            empty = pa.nulls(len(batch))
            arrays = [columns.get(field.name, empty).cast(field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            start += len(batch)


def _status(fault: str | None) -> str:
    return "pending" if fault is None or fault.startswith("caption: ") else "failed"
