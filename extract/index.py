"""The index: every input gets its grid row before anything is decoded. Parts of a corpus are listed in parallel, each
into a temporary file; these are read back in order and numbered, so that memory does not grow with the rows."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
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
from mmkd.extract.corpora import Corpus, Part, corpus_digest
from mmkd.extract.corpus_parts import only_written_again, what_changed, write_parts
from mmkd.extract.listing import HASH, batches, list_parts
from mmkd.extract.numbering import CAPTIONS, caption_rows, number_rows
from mmkd.extract.report import Overview
from mmkd.store.layout import rows_per_shard
from mmkd.store.record import CorpusRecord, CorpusSpan, Store, StoreRecord, read_record
from mmkd.store.samples import PartFiles, read_part, sample_schema, with_labels, write_part
from mmkd.store.writer import append_rows, create_store, finish_append, first_new_row

CAPTIONS_KIND = "captions"
"""Kind of the corpus that holds the further captions of another one."""


class _Earlier(NamedTuple):
    """Inputs that a store has already: grid rows int64 (m,), and hashes of their keys uint64 (m, 2)."""

    rows: NDArray[np.int64] = np.empty(0, np.int64)
    hashes: NDArray[np.uint64] = np.empty((0, 2), np.uint64)
    end: int = 0
    """Grid row where the next corpus begins."""


def create_indexed_store(corpus: Corpus, root: StorePath, per_shard: Callable[[int], int] | None = None) -> Store:
    """List the corpus and lay an empty store over it. A key that occurs again is kept as a failed row that names the
    first one. `per_shard`: rows of a shard by those of the corpus. Raises CorpusError for a corpus without rows, or
    that cannot be read; as `create_store` otherwise."""
    parts = corpus.parts()
    with _index(corpus, parts, per_shard=per_shard or rows_per_shard) as (tables, overview):
        (record, index), *further = _with_records(corpus, parts, tables)
        created = create_store(root, record, index, per_shard and per_shard(record.rows), further=further)
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
    with _index(corpus, parts, _inputs_before(store, first), _own_shards(store)) as (tables, overview):
        for line in overview.lines():
            say(line)
        (record, index), *further = _with_records(corpus, parts, tables, **facts)
        return append_rows(store, record, index, further=further).record.span_of(first)


def _with_records(
    corpus: Corpus, parts: Sequence[Part], tables: Sequence[pa.Table], **facts: Any
) -> list[tuple[CorpusRecord, pa.Table]]:
    """Return the tables of `_index` with their records."""
    digest, root = corpus_digest(corpus, parts), str(corpus.root)
    own = {**facts, "kind": corpus.kind, "location": corpus.location, "labels": corpus.labels, "digest": digest}
    beside = {"kind": CAPTIONS_KIND, "location": f"{CAPTIONS_KIND} of {corpus.location}", "towers": ("text",)}
    about: list[dict[str, Any]] = [own, {**beside, "digest": _captions_digest(digest)}]
    return [
        (CorpusRecord(rows=len(table), root=root, **members), table)
        for table, members in zip(tables, about, strict=False)
    ]


def _captions_digest(digest: str) -> str:
    """Return the digest of the further captions of a corpus."""
    return hashlib.sha256(f"{CAPTIONS_KIND} of {digest}".encode()).hexdigest()


def _with_captions(span: CorpusSpan, record: StoreRecord) -> list[CorpusSpan]:
    """Return a corpus' place in the grid, and that of its further captions, if it has some."""
    wanted = _captions_digest(span.corpus.digest)
    return [span, *(one for one in record.spans() if one.corpus.digest == wanted)]


def _inputs_before(store: Store, end: int) -> _Earlier:
    """Return the inputs below grid row `end`, a shard boundary. Reads the sample parts, one after the other."""
    rows, hashes = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    for shard in range(end // store.record.rows_per_shard):
        table, _ = read_part(store.root, shard)
        rows.append(table["row"].to_numpy())
        keys = b"".join(map(key_hash, table["key"].to_pylist()))
        hashes.append(np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2))
    return _Earlier(np.concatenate(rows), np.concatenate(hashes), end)


def restore_parts(corpus: Corpus, store: Store) -> int:
    """List the corpus again for sample parts that are missing (`mmkd store verify --repair` drops damaged ones);
    return how many were written, with pending rows. Raises as `check_same_corpus`; StoreError if it cannot write."""
    spans, files = _with_captions(check_same_corpus(corpus, store), store.record), PartFiles(store.root)
    missing = [(n, shard) for n, span in enumerate(spans) for shard in span.shards if shard not in files]
    if missing:
        per_shard, first = store.record.rows_per_shard, spans[0].rows.start
        schema = sample_schema(store.record.labels)
        with _index(corpus, corpus.parts(), _inputs_before(store, first), _own_shards(store)) as (tables, _):
            for number, shard in missing:
                start = shard * per_shard - spans[number].rows.start
                write_part(
                    store.root, shard, with_labels(tables[number].slice(start, per_shard), schema).combine_chunks()
                )
    return len(missing)


def _own_shards(store: Store) -> Callable[[int], int]:
    return lambda _: store.record.rows_per_shard


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
    spans = _with_captions(store.record.spans()[0], store.record)
    with _index(corpus, parts, per_shard=_own_shards(store)) as (tables, _):
        if list(map(len, tables)) != [len(span.rows) for span in spans] or corpus.labels != spans[0].corpus.labels:
            return False
        # What the corpus decides; the other columns say what became of a row.
        columns = ["row", "key", "caption", "modality", "uri", "offset", "length", "image_rows", "caption_kind"]
        files = PartFiles(store.root)
        for span, table in zip(spans, tables, strict=True):
            names = [*columns, *span.corpus.labels]
            for shard in (shard for shard in span.shards if shard in files):
                rows, stored = store.record.shard_rows(shard), read_part(store.root, shard)[0].select(names)
                listed = table.slice(rows.start - span.rows.start, len(rows)).select(names)
                if not listed.combine_chunks().equals(stored):
                    return False
    return True


@contextmanager
def _index(
    corpus: Corpus,
    parts: Sequence[Part],
    earlier: _Earlier | None = None,
    per_shard: Callable[[int], int] = rows_per_shard,
) -> Iterator[tuple[list[pa.Table], Overview]]:
    """The corpus as a table, numbered from `earlier.end` on, mapped from a file: it may be larger than memory; behind
    it its further captions, if there are any, from the next boundary of `per_shard` rows on, a function of the rows."""
    earlier = earlier or _Earlier()
    with tempfile.TemporaryDirectory(prefix="mmkd-index-") as name:
        folder = Path(name)
        listed = list(list_parts(corpus, parts, folder))
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
            for column in (batch.column(HASH) for batch in batches(files)):
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
        schema = sample_schema(corpus.labels)
        spools = {folder / "index.arrow": schema, folder / "captions.arrow": CAPTIONS}
        with disk_errors(folder), ExitStack() as stack:
            index, captions = (
                stack.enter_context(pa.ipc.new_stream(stack.enter_context(pa.OSFile(str(spool), "wb")), of))
                for spool, of in spools.items()
            )
            for rows, further in number_rows(files, duplicates, start=earlier.end, paired=paired, overview=overview):
                index.write_batch(pa.RecordBatch.from_arrays([rows[name] for name in schema.names], schema=schema))
                captions.write_table(pa.Table.from_pylist(further, schema=CAPTIONS))
        with ExitStack() as stack:
            rows, further = (
                pa.ipc.open_stream(stack.enter_context(pa.memory_map(str(spool)))).read_all() for spool in spools
            )
            size = per_shard(len(rows))
            behind = list(caption_rows(further, rows, -(-(earlier.end + len(rows)) // size) * size))
            overview.further = sum(map(len, behind))
            yield [rows, *([pa.Table.from_batches(behind)] if behind else [])], overview
