"""Listing a corpus, part by part in parallel, each into a file of its own: memory does not grow with the rows."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mmkd.base.duplicates import key_hash
from mmkd.base.files import disk_errors
from mmkd.base.process import usable_cores
from mmkd.extract.corpora import Corpus, CorpusRow, Ignored, Part
from mmkd.extract.corpora.row import (
    CAPTION_FAULT,
    MAX_CAPTION,
    MAX_KEY,
    MAX_LABEL,
    ONE_SIDED,
    is_blank,
    replace_surrogates,
)
from mmkd.store.samples import FIXED_COLUMNS

BATCH = 8192
# Listing is Python work, so processes share it; below this a process costs more to start than it saves.
_BYTES_WORTH_PROCESSES = 1 << 30

# Columns beside those of the sample table, by names that no label has.
HASH, IF_TAKEN, BY_DESIGN, JOINS, KIND, FURTHER = (
    f"\0{name}" for name in ("hash", "if_taken", "by_design", "joins", "kind", "further")
)


class Listed(NamedTuple):
    """One part: its rows in a file, how many have an image or a caption, and what it ignores."""

    file: Path
    rows: int
    images: int
    captions: int
    ignored: list[Ignored]


def list_parts(corpus: Corpus, parts: Sequence[Part], folder: Path) -> Iterator[Listed]:
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


def _list_part(corpus: Corpus, part: Part, file: Path, labels: tuple[str, ...]) -> Listed:
    ignored: dict[str, Ignored] = {}

    def rows() -> Iterator[CorpusRow]:
        for row in corpus.rows_of(part):
            if isinstance(row, CorpusRow):
                yield row
            elif (first := ignored.setdefault(row.reason, row)) is not row:
                ignored[row.reason] = replace(first, count=first.count + row.count)

    # The sample table's columns before it is numbered, and the key's hash.
    own = [pa.field(HASH, pa.binary(16)), pa.field(IF_TAKEN, pa.string()), pa.field(BY_DESIGN, pa.bool_())]
    more = pa.list_(pa.struct([("text", pa.large_string()), ("kind", pa.string())]))
    own += [pa.field(JOINS, pa.bool_()), pa.field(KIND, pa.string()), pa.field(FURTHER, more)]
    numbers = [pa.field(name, pa.int64()) for name in ("offset", "length")]
    numbers += [FIXED_COLUMNS.field(name) for name in ("image_rows", "view_number")]
    texts = [pa.field(name, pa.string()) for name in ("key", "caption", "modality", "uri", "reason", *labels)]
    schema = pa.schema([*own, *numbers, *texts])
    left, count, images, captions = rows(), 0, 0, 0
    with disk_errors(file), pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(left, BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist([cells_of(row, labels) for row in batch], schema=schema))
            count += len(batch)
            images += sum(row.uri is not None and not row.by_design for row in batch)
            captions += sum(row.caption is not None and not row.by_design for row in batch)
    return Listed(file, count, images, captions, list(ignored.values()))


def cells_of(row: CorpusRow, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return a row's cells by column, with its reason, if any; keys, captions and labels cut to their limits."""
    return {
        HASH: key_hash(row.key),
        IF_TAKEN: cut(row.if_taken),
        BY_DESIGN: row.by_design,
        JOINS: row.joins,
        KIND: cut(row.caption_kind),
        FURTHER: [{"text": replace_surrogates(text), "kind": kind} for text, kind in row.further] or None,
        "key": replace_surrogates(row.key[:MAX_KEY]),
        # A caption that is too long would slow every reader of the table: it fails, and is not stored.
        "caption": "" if len(row.caption or "") > MAX_CAPTION else cut(row.caption, MAX_CAPTION),
        "modality": cut(row.modality),
        "uri": cut(row.uri, 2 * MAX_KEY),
        "offset": row.offset,
        "length": row.length,
        "image_rows": row.image_rows,
        "view_number": row.view_number,
        "reason": _fault(row),
        **{label: cut(row.labels.get(label)) for label in labels},
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


def cut(value: str | None, end: int = MAX_LABEL) -> str | None:
    return None if value is None else replace_surrogates(value[:end])


def batches(files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader:
            yield from reader
