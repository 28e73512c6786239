"""The index: every input gets its grid row before anything is decoded. Parts of a corpus (tars, Parquet files, folders)
are listed in parallel, each into a file of its own; these are read back in order and numbered. Memory does not grow
with the number of rows: they lie in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.duplicates import find_duplicates, key_hash
from mmkd.base.errors import CorpusError
from mmkd.base.files import disk_errors
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath
from mmkd.base.process import usable_cores
from mmkd.extract.corpora import Corpus, CorpusRow, Ignored, Part, corpus_digest
from mmkd.extract.corpora.row import (
    CAPTION_FAULT,
    MAX_CAPTION,
    MAX_KEY,
    MAX_LABEL,
    NO_CAPTION,
    NO_IMAGE,
    ONE_SIDED,
    decodable,
    is_blank,
)
from mmkd.extract.corpus_parts import only_written_again, what_changed, write_parts
from mmkd.extract.overview import Overview
from mmkd.store.layout import sample_part
from mmkd.store.record import CorpusRecord, CorpusSpan, Store, StoreRecord, read_record
from mmkd.store.samples import read_part, sample_schema, with_labels, write_part
from mmkd.store.writer import append_rows, create_store, finish_append, first_new_row

_BATCH = 8192
# Listing is Python work, so processes share it; below this a process costs more to start than it saves.
_BYTES_WORTH_PROCESSES = 1 << 30
# Columns of the sample table that the corpus decides; the others say what became of a row.
_LISTED = ("row", "key", "caption", "modality", "uri", "offset", "length")

# Names that no label has.
_HASH, _IF_TAKEN, _BY_DESIGN = "\0hash", "\0if_taken", "\0by_design"


def create_indexed_store(corpus: Corpus, root: StorePath) -> Store:
    """List the corpus and lay an empty store over it. A key that occurs again is kept as a failed row that names the
    first one: nothing else is lost. Raises CorpusError if the corpus has no rows, or cannot be read; StoreError if the
    store cannot be written."""
    parts = corpus.parts()
    with _indexed(corpus, parts, _Earlier.none()) as (index, overview):
        created = create_store(root, _corpus_record(corpus, parts, len(index)), index)
    write_parts(root, corpus.settings(), parts, overview)
    return created


def list_corpus(corpus: Corpus) -> Overview:
    """Return overview of the corpus as `create_indexed_store` would list it; keeps nothing. Raises CorpusError as
    `create_indexed_store`."""
    with _indexed(corpus, corpus.parts(), _Earlier.none()) as (_, overview):
        return overview


def append_corpus(corpus: Corpus, root: StorePath, say: Callable[[str], object] = lambda line: None) -> CorpusSpan:
    """List a further corpus below the rows of a store; its rows are pending until they are extracted. A key that the
    store has already is kept as a failed row that names the first one. Appending a corpus that is there already only
    finishes what an interruption left. Raises CorpusError if the corpus has no rows, or cannot be read. Raises
    StoreError if there is no store at `root`, or it cannot be written. Raises BusyStoreError if another process writes
    to it.

    Args:
        corpus: what is added.
        root: the store.
        say: receives the lines of the corpus' overview.
    """
    read_record(root)
    with only_writer(root, "mmkd store append"):
        store = Store.open(root)
        present = corpus_span(corpus, store.record)
        if present is not None:
            finish_append(store)
            return present
        first, parts = first_new_row(store.record), corpus.parts()
        with _indexed(corpus, parts, _Earlier.of(store, first)) as (index, overview):
            for line in overview.lines():
                say(line)
            return append_rows(store, _corpus_record(corpus, parts, len(index)), index).record.spans()[-1]


def _corpus_record(corpus: Corpus, parts: Sequence[Part], rows: int) -> CorpusRecord:
    return CorpusRecord(
        kind=corpus.kind,
        location=corpus.location,
        root=str(corpus.root),
        rows=rows,
        labels=corpus.labels,
        digest=corpus_digest(corpus, parts),
    )


@dataclass(frozen=True)
class _Earlier:
    """The inputs that a store has already. rows: int64 (m,), grid rows; hashes: uint64 (m, 2) of their keys."""

    rows: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    end: int
    """Grid row where the next corpus begins."""

    @classmethod
    def none(cls) -> _Earlier:
        """Return the empty state of a new store."""
        return cls(np.empty(0, np.int64), np.empty((0, 2), np.uint64), 0)

    @classmethod
    def of(cls, store: Store, end: int) -> _Earlier:
        """Return the inputs below grid row `end`, a shard boundary. Reads the sample parts, one after the other."""
        rows, hashes = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
        for shard in range(end // store.record.rows_per_shard):
            table, _ = read_part(store.root, shard)
            rows.append(table["row"].to_numpy())
            keys = b"".join(key_hash(key) for key in table["key"].to_pylist())
            hashes.append(np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2))
        return cls(np.concatenate(rows), np.concatenate(hashes), end)

    def duplicates(self, files: Sequence[Path], total: int) -> dict[int, int]:
        """New grid rows whose key occurred before, and the grid row that had it first."""
        known = len(self.rows)

        def grid(place: int) -> int:
            return int(self.rows[place]) if place < known else self.end + place - known

        found = find_duplicates(lambda: chain([self.hashes], _hashes(files)), known + total)
        return {grid(place): grid(first) for place, first in found.items() if place >= known}


def restore_parts(corpus: Corpus, store: Store) -> int:
    """List the corpus again for sample parts that are missing (`mmkd store verify --repair` drops damaged ones).
    Returns the parts that were written; their rows are pending. Raises CorpusError as `check_same_corpus`. Raises
    StoreError if the store cannot be written."""
    span = check_same_corpus(corpus, store)
    missing = [shard for shard in span.shards if not (store.root / sample_part(shard)).is_file()]
    if missing:
        per_shard, first = store.record.rows_per_shard, span.rows.start
        with _indexed(corpus, corpus.parts(), _Earlier.of(store, first)) as (index, _):
            for shard in missing:
                rows = with_labels(
                    index.slice(shard * per_shard - first, per_shard), sample_schema(store.record.labels)
                )
                write_part(store.root, shard, rows.combine_chunks())
    return len(missing)


def corpus_span(corpus: Corpus, record: StoreRecord) -> CorpusSpan | None:
    """Return a corpus' place in the store's grid; None when it is absent."""
    digest = corpus_digest(corpus, corpus.parts())
    return next((span for span in record.spans() if span.corpus.digest == digest), None)


def check_same_corpus(corpus: Corpus, store: Store) -> CorpusSpan:
    """Refuse to go on with a store that does not hold this corpus; where it lies in the grid. Files that were only
    written again (restored from a copy, brought back after a purge) are listed again and pass when they give the same
    rows. Images are compared by their SHA-256 when a later teacher reads them. Raises CorpusError if a file of the
    corpus has another name, size or hash than when the store was made, was written again with other rows, or is read
    otherwise; the first difference is named."""
    root, record = store.root, store.record
    span = corpus_span(corpus, record)
    if span is not None:
        return span
    parts = corpus.parts()
    if only_written_again(root, corpus.settings(), parts) and _same_rows(corpus, parts, store):
        return record.spans()[0]
    made_from = " and ".join(span.corpus.location for span in record.spans())
    changed = what_changed(root, corpus.settings(), parts)
    raise CorpusError(
        f"{root} was made from {made_from} as it was on {record.created}; {corpus.location} differs "
        f"from that{f': {changed}' if changed else ''}; name a new store, bring the old corpus back, or add "
        f"its rows with `mmkd store append {root} {corpus.location}`"
    )


def _same_rows(corpus: Corpus, parts: Sequence[Part], store: Store) -> bool:
    """Return True when the corpus gives the content of the store's first span; missing parts are not compared."""
    span = store.record.spans()[0]
    with _indexed(corpus, parts, _Earlier.none()) as (index, _):
        if len(index) != len(span.rows) or corpus.labels != span.corpus.labels:
            return False
        columns = [*_LISTED, *corpus.labels]
        for shard in span.shards:
            rows = store.record.shard_rows(shard)
            if (store.root / sample_part(shard)).is_file():
                stored = read_part(store.root, shard)[0].select(columns)
                if not index.slice(rows.start, len(rows)).select(columns).combine_chunks().equals(stored):
                    return False
    return True


@contextmanager
def _indexed(corpus: Corpus, parts: Sequence[Part], earlier: _Earlier) -> Iterator[tuple[pa.Table, Overview]]:
    """The corpus as a table, numbered from `earlier.end` on, mapped from a file: it may be larger than memory."""
    with tempfile.TemporaryDirectory(prefix="mmkd-index-") as name:
        folder = Path(name)
        listed = list(_list_parts(corpus, parts, folder))
        total = sum(part.rows for part in listed)
        overview = Overview()
        for one in chain(corpus.ignored(), *(part.ignored for part in listed)):
            overview.ignore(one)
        if not total:
            lines = ["no image or caption was found in it", *(line.strip() for line in islice(overview.lines(), 1, 4))]
            raise CorpusError(f"corpus {corpus.location} is empty: {'; '.join(lines)}")
        files = [part.file for part in listed]
        duplicates = earlier.duplicates(files, total)
        paired = any(part.images for part in listed) and any(part.captions for part in listed)
        # Spooled to a file and mapped back: the number of rows decides the shards, and is known last.
        spool = folder / "index.arrow"
        _number(
            files, duplicates, paired=paired, labels=corpus.labels, spool=spool, start=earlier.end, overview=overview
        )
        with pa.memory_map(str(spool)) as source:
            yield pa.ipc.open_stream(source).read_all(), overview


_Job = tuple[Corpus, Part, Path, tuple[str, ...]]


class _Listed(NamedTuple):
    """One part: its rows in a file, how many have an image or a caption, and what it ignores."""

    file: Path
    rows: int
    images: int
    captions: int
    ignored: list[Ignored]


def _list_parts(corpus: Corpus, parts: Sequence[Part], folder: Path) -> Iterator[_Listed]:
    """List every part into its own file, in the parts' order."""
    labels = corpus.labels
    jobs: list[_Job] = [(corpus, part, folder / f"{i}.arrow", labels) for i, part in enumerate(parts)]
    cores = usable_cores()
    if len(jobs) > 1 and cores > 1 and sum(part.size for part in parts) > _BYTES_WORTH_PROCESSES:
        # Spawned processes: a fork with threads (Arrow's, Dask's) may deadlock.
        with ProcessPoolExecutor(min(cores, len(jobs)), mp_context=get_context("spawn")) as processes:
            yield from processes.map(_list_part, jobs)
        return
    # Threads wait for a network together, and more of them than cores do.
    threads = 16 if "://" in str(corpus.root) else cores
    with ThreadPoolExecutor(min(threads, max(1, len(jobs))), thread_name_prefix="mmkd-index") as pool:
        yield from pool.map(_list_part, jobs)


def _list_part(job: _Job) -> _Listed:
    corpus, part, file, labels = job
    schema = _listing_schema(labels)
    ignored: dict[str, Ignored] = {}

    def rows() -> Iterator[CorpusRow]:
        for row in corpus.rows_of(part):
            if isinstance(row, CorpusRow):
                yield row
            else:
                first = ignored.get(row.reason)
                ignored[row.reason] = row if first is None else replace(first, count=first.count + row.count)

    left, count, images, captions = rows(), 0, 0, 0
    with disk_errors(file), pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(left, _BATCH)):
            writer.write_batch(_row_batch(batch, labels, schema))
            count += len(batch)
            images += sum(row.uri is not None and not row.by_design for row in batch)
            captions += sum(row.caption is not None and not row.by_design for row in batch)
    return _Listed(file, count, images, captions, list(ignored.values()))


def _listing_schema(labels: tuple[str, ...]) -> pa.Schema:
    """Return columns of a listed part: the sample table's before it is numbered, and the key's hash."""
    texts = [pa.field(name, pa.string()) for name in ("key", "caption", "modality", "uri", "reason")]
    numbers = [pa.field(name, pa.int64()) for name in ("offset", "length")]
    own = [pa.field(_HASH, pa.binary(16)), pa.field(_IF_TAKEN, pa.string()), pa.field(_BY_DESIGN, pa.bool_())]
    return pa.schema([*own, *texts, *numbers, *(pa.field(label, pa.string()) for label in labels)])


def _row_batch(rows: Sequence[CorpusRow], labels: tuple[str, ...], schema: pa.Schema) -> pa.RecordBatch:
    """Return the rows with their reasons, if any; keys, captions and labels cut to their limits."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in rows:
        values: dict[str, Any] = {
            _HASH: key_hash(row.key),
            _IF_TAKEN: row.if_taken,
            _BY_DESIGN: row.by_design,
            "key": decodable(row.key[:MAX_KEY]),
            # A caption that is too long would slow every reader of the table: it fails, and is not stored.
            "caption": "" if len(row.caption or "") > MAX_CAPTION else _cut(row.caption, MAX_CAPTION),
            "modality": _cut(row.modality),
            "uri": None if row.uri is None else row.uri[: 2 * MAX_KEY],
            "offset": row.offset,
            "length": row.length,
            "reason": _fault(row),
        }
        values.update((label, _cut(row.labels.get(label))) for label in labels)
        for name, column in columns.items():
            column.append(values[name])
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[field.name], type=field.type) for field in schema], schema=schema
    )


def _fault(row: CorpusRow) -> str | None:
    fault, caption = row.fault, row.caption
    if fault is not None and not fault.startswith((CAPTION_FAULT, *ONE_SIDED)):
        return fault
    if len(row.key) > MAX_KEY:
        fault = f"key: longer than {MAX_KEY:,} characters"
    elif row.uri is not None and (len(row.uri) > 2 * MAX_KEY or not _encodable(row.uri)):
        fault = "row: image path is too long or not UTF-8"
    elif row.uri is None and not caption and not (fault or "").startswith(CAPTION_FAULT):
        fault = "key: neither image nor caption"
    elif caption is not None and len(caption) > MAX_CAPTION:
        fault = f"{CAPTION_FAULT}longer than {MAX_CAPTION:,} characters"
    elif caption is not None and not _encodable(caption):
        fault = f"{CAPTION_FAULT}not UTF-8"
    elif fault is None and caption is not None and is_blank(caption):
        fault = f"{CAPTION_FAULT}empty"
    return fault


def _cut(value: str | None, end: int = MAX_LABEL) -> str | None:
    return None if value is None else decodable(value[:end])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batches(files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader:
            yield from reader


def _hashes(files: Sequence[Path]) -> Iterator[NDArray[np.uint64]]:
    for batch in _batches(files):
        column = batch.column(_HASH)
        data = np.frombuffer(column.buffers()[1], dtype=np.uint64)
        yield data[2 * column.offset : 2 * (column.offset + len(column))].reshape(-1, 2)


def _number(
    files: Sequence[Path],
    duplicates: dict[int, int],
    *,
    paired: bool,
    labels: tuple[str, ...],
    spool: Path,
    start: int,
    overview: Overview,
) -> None:
    """Write the final index to `spool`: rows numbered from `start`, statuses known before reading set.

    Args:
        files: the listed parts.
        duplicates: rows whose key occurred before, and the first row that had it.
        paired: the corpus has images and captions, so that a row with one of them lacks the other.
        labels: label columns.
        spool, start: where to, and the first grid row.
        overview: counts the rows.
    """
    schema, captions = sample_schema(labels), _Captions(duplicates)
    with disk_errors(spool), pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(files):
            columns = {
                name: batch.column(name).to_pylist()
                for name in ("key", "uri", "caption", "reason", _IF_TAKEN, _BY_DESIGN)
            }
            keys, faults = columns["key"], columns["reason"]
            rows = range(start, start + len(batch))
            for place, (row, uri, caption) in enumerate(zip(rows, columns["uri"], columns["caption"], strict=True)):
                if row in duplicates and (
                    columns[_IF_TAKEN][place] is None or not captions.is_new(row, caption, faults[place])
                ):
                    faults[place] = f"key: duplicate of row {duplicates[row]}"
                elif row in duplicates:
                    keys[place] = f"{keys[place]}#{columns[_IF_TAKEN][place]}"
                captions.note(row, caption)
                if paired and faults[place] is None and not columns[_BY_DESIGN][place]:
                    faults[place] = NO_IMAGE if uri is None else NO_CAPTION if caption is None else None
                overview.add_row(keys[place], uri is not None, bool(caption), faults[place])
            arrays = {field.name: batch.column(field.name) for field in batch.schema} | {
                "row": pa.array(rows, pa.int64()),
                "key": pa.array(keys, pa.string()),
                "reason": pa.array(faults, pa.string()),
                "status": pa.array([_status(fault) for fault in faults], pa.string()),
            }
            empty = pa.nulls(len(batch))
            cells = [arrays.get(field.name, empty).cast(field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(cells, schema=schema))
            start += len(batch)


class _Captions:
    """Captions of rows that share an image and have no key of their own: equal ones are duplicates."""

    def __init__(self, duplicates: Mapping[int, int]) -> None:
        self._first = duplicates
        self._shared = set(duplicates.values())
        self._seen: dict[int, set[bytes]] = {}

    def note(self, row: int, caption: str | None) -> None:
        """Remember a caption of a key that occurs again."""
        first = self._first.get(row, row)
        if first in self._shared:
            self._seen.setdefault(first, set()).add(key_hash(caption or ""))

    def is_new(self, row: int, caption: str | None, fault: str | None) -> bool:
        """Return True when this store's earlier rows of the same key have other captions."""
        seen = self._seen.get(self._first[row])
        return seen is not None and fault is None and bool(caption) and key_hash(caption or "") not in seen


def _status(fault: str | None) -> str:
    return "pending" if fault is None or fault.startswith((CAPTION_FAULT, *ONE_SIDED)) else "failed"
