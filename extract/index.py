"""The index: every input gets its grid row before anything is decoded. Parts of a corpus are listed in parallel, each
into a temporary file; these are read back in order and numbered, so that memory does not grow with the rows."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice, repeat
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
    is_blank,
    replace_surrogates,
)
from mmkd.extract.corpus_parts import only_written_again, what_changed, write_parts
from mmkd.extract.report import Overview
from mmkd.store.layout import sample_part
from mmkd.store.record import CorpusRecord, CorpusSpan, Store, StoreRecord, read_record
from mmkd.store.samples import FIXED_COLUMNS, read_part, sample_schema, with_labels, write_part
from mmkd.store.writer import append_rows, create_store, finish_append, first_new_row

_BATCH = 8192
# Listing is Python work, so processes share it; below this a process costs more to start than it saves.
_BYTES_WORTH_PROCESSES = 1 << 30

# Names that no label has.
_HASH, _IF_TAKEN, _BY_DESIGN = "\0hash", "\0if_taken", "\0by_design"


class _Earlier(NamedTuple):
    """Inputs that a store has already: grid rows int64 (m,), and hashes of their keys uint64 (m, 2)."""

    rows: NDArray[np.int64] = np.empty(0, np.int64)
    hashes: NDArray[np.uint64] = np.empty((0, 2), np.uint64)
    end: int = 0
    """Grid row where the next corpus begins."""


def create_indexed_store(corpus: Corpus, root: StorePath) -> Store:
    """List the corpus and lay an empty store over it. A key that occurs again is kept as a failed row that names the
    first one. Raises CorpusError for a corpus without rows, or that cannot be read; StoreError if it cannot write."""
    parts = corpus.parts()
    with _index(corpus, parts) as (index, overview):
        created = create_store(root, _corpus_record(corpus, parts, len(index)), index)
    write_parts(root, corpus.settings(), parts, overview)
    return created


def list_corpus(corpus: Corpus) -> Overview:
    """Return the overview of the corpus as `create_indexed_store` would list it, and raise as it does; keep nothing."""
    with _index(corpus, corpus.parts()) as (_, overview):
        return overview


def append_corpus(corpus: Corpus, root: StorePath, say: Callable[[str], object] = lambda line: None) -> CorpusSpan:
    """List a further corpus below the rows of a store, as pending rows; a key that the store has already is kept as a
    failed row that names the first one. A corpus that is there already only finishes what an interruption left. `say`
    receives the lines of its overview. Raises as `create_indexed_store`; StoreError if there is no store at `root`;
    BusyStoreError if another process writes to it."""
    read_record(root)
    with only_writer(root, "mmkd store append"):
        return append_below(Store.open(root), corpus, say)


def append_below(
    store: Store, corpus: Corpus, say: Callable[[str], object] = lambda line: None, **facts: Any
) -> CorpusSpan:
    """As `append_corpus`, by the writer of the store. `facts`: further members of the corpus' record."""
    if present := corpus_span(corpus, store.record):
        finish_append(store)
        return present
    first, parts = first_new_row(store.record), corpus.parts()
    with _index(corpus, parts, _inputs_before(store, first)) as (index, overview):
        for line in overview.lines():
            say(line)
        return append_rows(store, _corpus_record(corpus, parts, len(index), **facts), index).record.spans()[-1]


def _corpus_record(corpus: Corpus, parts: Sequence[Part], rows: int, **facts: Any) -> CorpusRecord:
    return CorpusRecord(
        **facts,
        kind=corpus.kind,
        location=corpus.location,
        root=str(corpus.root),
        rows=rows,
        labels=corpus.labels,
        digest=corpus_digest(corpus, parts),
    )


def _inputs_before(store: Store, end: int) -> _Earlier:
    """Return the inputs below grid row `end`, a shard boundary. Reads the sample parts, one after the other."""
    rows, keys = [np.empty(0, np.int64)], []
    for shard in range(end // store.record.rows_per_shard):
        table, _ = read_part(store.root, shard)
        rows.append(table["row"].to_numpy())
        keys += [key_hash(key) for key in table["key"].to_pylist()]
    return _Earlier(np.concatenate(rows), np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2), end)


def restore_parts(corpus: Corpus, store: Store) -> int:
    """List the corpus again for sample parts that are missing (`mmkd store verify --repair` drops damaged ones);
    return how many were written, with pending rows. Raises as `check_same_corpus`; StoreError if it cannot write."""
    span = check_same_corpus(corpus, store)
    if missing := [shard for shard in span.shards if not (store.root / sample_part(shard)).is_file()]:
        per_shard, first = store.record.rows_per_shard, span.rows.start
        schema = sample_schema(store.record.labels)
        with _index(corpus, corpus.parts(), _inputs_before(store, first)) as (index, _):
            for shard in missing:
                rows = with_labels(index.slice(shard * per_shard - first, per_shard), schema)
                write_part(store.root, shard, rows.combine_chunks())
    return len(missing)


def corpus_span(corpus: Corpus, record: StoreRecord) -> CorpusSpan | None:
    """Return a corpus' place in the store's grid; None when it is absent."""
    digest = corpus_digest(corpus, corpus.parts())
    return next((span for span in record.spans() if span.corpus.digest == digest), None)


def check_same_corpus(corpus: Corpus, store: Store) -> CorpusSpan:
    """Return where the corpus lies in the store's grid. Files that were only written again (restored from a copy) pass
    when they give the same rows; images are compared by SHA-256 when a later teacher reads them. Raises CorpusError,
    which names the first difference, if a file has another name, size, hash or rows, or is read otherwise."""
    root, record = store.root, store.record
    if span := corpus_span(corpus, record):
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
    with _index(corpus, parts) as (index, _):
        if len(index) != len(span.rows) or corpus.labels != span.corpus.labels:
            return False
        # What the corpus decides; the other columns say what became of a row.
        columns = ["row", "key", "caption", "modality", "uri", "offset", "length", *corpus.labels]
        for shard in (shard for shard in span.shards if (store.root / sample_part(shard)).is_file()):
            rows, stored = store.record.shard_rows(shard), read_part(store.root, shard)[0].select(columns)
            if not index.slice(rows.start, len(rows)).select(columns).combine_chunks().equals(stored):
                return False
    return True


@contextmanager
def _index(
    corpus: Corpus, parts: Sequence[Part], earlier: _Earlier | None = None
) -> Iterator[tuple[pa.Table, Overview]]:
    """The corpus as a table, numbered from `earlier.end` on, mapped from a file: it may be larger than memory."""
    earlier = earlier or _Earlier()
    with tempfile.TemporaryDirectory(prefix="mmkd-index-") as name:
        folder = Path(name)
        listed = list(_list_parts(corpus, parts, folder))
        files, total = [part.file for part in listed], sum(part.rows for part in listed)
        overview = Overview()
        for one in chain(corpus.ignored(), *(part.ignored for part in listed)):
            overview.ignore(one)
        if not total:
            lines = ["no image or caption was found in it", *(line.strip() for line in islice(overview.lines(), 1, 4))]
            raise CorpusError(f"corpus {corpus.location} is empty: {'; '.join(lines)}")
        known = len(earlier.rows)

        def hashes() -> Iterator[NDArray[np.uint64]]:
            yield earlier.hashes
            for column in (batch.column(_HASH) for batch in _batches(files)):
                data = np.frombuffer(column.buffers()[1], dtype=np.uint64)
                yield data[2 * column.offset : 2 * (column.offset + len(column))].reshape(-1, 2)

        found, shift = find_duplicates(hashes, known + total), earlier.end - known
        duplicates = {
            place + shift: first + shift if first >= known else int(earlier.rows[first])
            for place, first in found.items()
            if place >= known
        }
        # A row with one side lacks the other only in a corpus of both.
        paired = any(part.images for part in listed) and any(part.captions for part in listed)
        # Spooled to a file and mapped back: the number of rows decides the shards, and is known last.
        spool, schema = folder / "index.arrow", sample_schema(corpus.labels)
        with disk_errors(spool), pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _number_rows(files, duplicates, start=earlier.end, paired=paired, overview=overview):
                writer.write_batch(pa.RecordBatch.from_arrays([batch[name] for name in schema.names], schema=schema))
        with pa.memory_map(str(spool)) as source:
            yield pa.ipc.open_stream(source).read_all(), overview


class _Listed(NamedTuple):
    """One part: its rows in a file, how many have an image or a caption, and what it ignores."""

    file: Path
    rows: int
    images: int
    captions: int
    ignored: list[Ignored]


def _list_parts(corpus: Corpus, parts: Sequence[Part], folder: Path) -> Iterator[_Listed]:
    """List every part into its own file, in the parts' order."""
    cores = usable_cores()
    pool: Executor
    if len(parts) > 1 and cores > 1 and sum(part.size for part in parts) > _BYTES_WORTH_PROCESSES:
        # Spawned processes: a fork with threads (Arrow's, Dask's) may deadlock.
        pool = ProcessPoolExecutor(min(cores, len(parts)), mp_context=get_context("spawn"))
    else:
        # Threads wait for a network together, and more of them than cores do.
        threads = 16 if "://" in str(corpus.root) else cores
        pool = ThreadPoolExecutor(min(threads, max(1, len(parts))), thread_name_prefix="mmkd-index")
    files = [folder / f"{number}.arrow" for number in range(len(parts))]
    with pool:
        yield from pool.map(_list_part, repeat(corpus), parts, files, repeat(corpus.labels))


def _list_part(corpus: Corpus, part: Part, file: Path, labels: tuple[str, ...]) -> _Listed:
    ignored: dict[str, Ignored] = {}

    def rows() -> Iterator[CorpusRow]:
        for row in corpus.rows_of(part):
            if isinstance(row, CorpusRow):
                yield row
            elif (first := ignored.setdefault(row.reason, row)) is not row:
                ignored[row.reason] = replace(first, count=first.count + row.count)

    # The sample table's columns before it is numbered, and the key's hash.
    own = [pa.field(_HASH, pa.binary(16)), pa.field(_IF_TAKEN, pa.string()), pa.field(_BY_DESIGN, pa.bool_())]
    numbers = [pa.field(name, pa.int64()) for name in ("offset", "length")]
    numbers += [FIXED_COLUMNS.field(name) for name in ("image_rows", "view_number")]
    texts = [pa.field(name, pa.string()) for name in ("key", "caption", "modality", "uri", "reason", *labels)]
    schema = pa.schema([*own, *numbers, *texts])
    left, count, images, captions = rows(), 0, 0, 0
    with disk_errors(file), pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(left, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist([_cells(row, labels) for row in batch], schema=schema))
            count += len(batch)
            images += sum(row.uri is not None and not row.by_design for row in batch)
            captions += sum(row.caption is not None and not row.by_design for row in batch)
    return _Listed(file, count, images, captions, list(ignored.values()))


def _cells(row: CorpusRow, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return a row's cells by column, with its reason, if any; keys, captions and labels cut to their limits."""
    return {
        _HASH: key_hash(row.key),
        _IF_TAKEN: _cut(row.if_taken),
        _BY_DESIGN: row.by_design,
        "key": replace_surrogates(row.key[:MAX_KEY]),
        # A caption that is too long would slow every reader of the table: it fails, and is not stored.
        "caption": "" if len(row.caption or "") > MAX_CAPTION else _cut(row.caption, MAX_CAPTION),
        "modality": _cut(row.modality),
        "uri": _cut(row.uri, 2 * MAX_KEY),
        "offset": row.offset,
        "length": row.length,
        "image_rows": row.image_rows,
        "view_number": row.view_number,
        "reason": _fault(row),
        **{label: _cut(row.labels.get(label)) for label in labels},
    }


def _fault(row: CorpusRow) -> str | None:
    fault, caption = row.fault, row.caption
    if fault is not None and not fault.startswith((CAPTION_FAULT, *ONE_SIDED)):
        return fault
    if len(row.key) > MAX_KEY:
        fault = f"key: longer than {MAX_KEY:,} characters"
    elif row.uri is not None and (len(row.uri) > 2 * MAX_KEY or replace_surrogates(row.uri) != row.uri):
        fault = "row: image path is too long or not UTF-8"
    elif row.uri is None and not caption and not (fault or "").startswith(CAPTION_FAULT):
        fault = "key: neither image nor caption"
    elif caption is not None and len(caption) > MAX_CAPTION:
        fault = f"{CAPTION_FAULT}longer than {MAX_CAPTION:,} characters"
    elif caption is not None and replace_surrogates(caption) != caption:
        fault = f"{CAPTION_FAULT}not UTF-8"
    elif fault is None and caption is not None and is_blank(caption):
        fault = f"{CAPTION_FAULT}empty"
    return fault


def _cut(value: str | None, end: int = MAX_LABEL) -> str | None:
    return None if value is None else replace_surrogates(value[:end])


def _batches(files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader:
            yield from reader


def _number_rows(
    files: Sequence[Path], duplicates: Mapping[int, int], *, start: int, paired: bool, overview: Overview
) -> Iterator[Mapping[str, pa.Array]]:
    """Yield the columns of the listed parts, a batch at a time, with grid rows from `start` on and the status known
    before reading; count them. `duplicates`: rows whose key occurred before, and the first row that had it."""
    shared = set(duplicates.values())
    captions: dict[int, set[bytes]] = {}
    for batch in _batches(files):
        names = ("key", "uri", "caption", "reason", _IF_TAKEN, _BY_DESIGN)
        keys, uris, texts, faults, if_taken, by_design = (batch.column(name).to_pylist() for name in names)
        rows = range(start, start + len(batch))
        for place, row in enumerate(rows):
            first, caption = duplicates.get(row), texts[place]
            if first is not None:
                # Rows that share an image and have no key of their own differ by their captions.
                seen = captions.get(first)
                is_new = seen is not None and bool(caption) and key_hash(caption) not in seen
                if is_new and if_taken[place] is not None and faults[place] is None:
                    keys[place] = f"{keys[place]}#{if_taken[place]}"
                else:
                    faults[place] = f"key: duplicate of row {first}"
            origin = row if first is None else first
            if origin in shared:
                captions.setdefault(origin, set()).add(key_hash(caption or ""))
            if paired and faults[place] is None and not by_design[place]:
                faults[place] = NO_IMAGE if uris[place] is None else NO_CAPTION if caption is None else None
            image, text = uris[place] is not None, bool(caption)
            overview.add_row(keys[place], image, text, faults[place], is_text=by_design[place] and text and not image)
        usable = (CAPTION_FAULT, *ONE_SIDED)
        status = ["pending" if fault is None or fault.startswith(usable) else "failed" for fault in faults]
        empty = {field.name: pa.nulls(len(batch), field.type) for field in FIXED_COLUMNS}
        made = {"row": rows, "key": keys, "reason": faults, "status": status}
        yield (
            empty
            | dict(zip(batch.schema.names, batch.columns, strict=True))
            | {name: pa.array(values, FIXED_COLUMNS.field(name).type) for name, values in made.items()}
        )
        start += len(batch)
