"""Corpus rows as Arrow batches, with their lengths bounded and their reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mmkd.base.duplicates import key_hash
from mmkd.extract.corpora.row import (
    CAPTION_FAULT,
    MAX_CAPTION,
    MAX_KEY,
    MAX_LABEL,
    ONE_SIDED,
    CorpusRow,
    decodable,
    is_blank,
)

# Names that no label has.
HASH, IF_TAKEN, BY_DESIGN = "\0hash", "\0if_taken", "\0by_design"
_COLUMNS = ("key", "caption", "modality", "uri", "offset", "length", "reason")


def listing_schema(labels: tuple[str, ...]) -> pa.Schema:
    """Columns of a listed part: the sample table's before it is numbered, and the key's hash."""
    numbers = {"offset", "length"}
    fixed = [pa.field(name, pa.int64() if name in numbers else pa.string()) for name in _COLUMNS]
    own = [pa.field(HASH, pa.binary(16)), pa.field(IF_TAKEN, pa.string()), pa.field(BY_DESIGN, pa.bool_())]
    return pa.schema([*own, *fixed, *(pa.field(label, pa.string()) for label in labels)])


def row_batch(rows: Sequence[CorpusRow], labels: tuple[str, ...], schema: pa.Schema) -> pa.RecordBatch:
    """The rows with their reasons, if any; keys, captions and labels cut to their limits."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in rows:
        values: dict[str, Any] = {
            HASH: key_hash(row.key),
            IF_TAKEN: row.if_taken,
            BY_DESIGN: row.by_design,
            "key": decodable(row.key[:MAX_KEY]),
            "caption": _bounded(row.caption),
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


def _bounded(caption: str | None) -> str | None:
    """A caption that is too long is not stored: it fails, and its row would slow every reader of the table."""
    if caption is None or len(caption) > MAX_CAPTION:
        return None if caption is None else ""
    return decodable(caption)


def _cut(value: str | None) -> str | None:
    return None if value is None else decodable(value[:MAX_LABEL])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
