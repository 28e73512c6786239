"""Corpora in Parquet: encoded images in cells (Hugging Face's struct of bytes and path too), or paths to files."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.base.errors import CorpusError
from mmkd.base.images.parquet import leaf
from mmkd.base.images.uri import CELL, fragment
from mmkd.base.places.place import Place
from mmkd.extract.corpora.captions import Captions, caption_list, caption_rows
from mmkd.extract.corpora.columns import TableColumns, label_names, roles
from mmkd.extract.corpora.files import FileCorpus
from mmkd.extract.corpora.row import CorpusRow, Part, as_label, first_text

_BATCH_ROWS = 4096
_DAMAGED = "archive: not Parquet, or damaged; what follows is lost"


class ParquetCorpus(FileCorpus):
    """A Parquet file, or all of a folder and the folders below it, in the order of their paths."""

    kind: Literal["parquet"] = "parquet"
    images: str | None = None
    """Folder that image paths are relative to; the folder of `path` when not given."""
    columns: TableColumns = TableColumns()
    label_columns: tuple[str, ...] | None = None
    """Columns that pass into the sample table; all others but binary ones when not given."""
    captions: Captions = "first"
    """Of a list of captions the first that is not blank, or a row for each."""

    suffixes = (".parquet",)

    @property
    def root(self) -> str:
        """The folder that Parquet files and image paths are below."""
        return str(self.base if self.images is None else Place.of(self.images).resolved())

    @functools.cached_property
    def _schema(self) -> pa.Schema:
        for part in self.parts():
            try:
                with self.opened(part) as file:
                    return pq.read_schema(file)
            except (pa.ArrowException, OSError):
                continue
        raise CorpusError(f"corpus {self.path}: none of its files is Parquet")

    @functools.cached_property
    def _roles(self) -> dict[str, str]:
        found = roles(self.columns, self._schema.names, self.path)
        if self.images is not None and "image" in found and _cell(self._schema.field(found["image"]).type):
            raise CorpusError(f"corpus {self.path}: the images are in column {found['image']!r}; leave `images` out")
        return found

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in the table's order; binary ones cannot be labels."""
        plain = [field.name for field in self._schema if not _holds_bytes(field.type)]
        header = [name for name in self._schema.names if name in plain or name in self._roles.values()]
        return label_names(self.label_columns, self._roles, header, self.path)

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """One row per table row; a failed one where the file is damaged.

        Raises:
            CorpusError: the file lacks a column that the first one has.
        """
        wanted = (*self._roles.values(), *self.labels)  # said before the first row when there are none
        try:
            with self.opened(part) as handle:
                file = pq.ParquetFile(handle, pre_buffer=False)
                missing = [name for name in wanted if name not in file.schema_arrow.names]
                if missing:
                    raise CorpusError(
                        f"{self.path}: {part.name} has no column {missing[0]!r}, which the first file has"
                    )
                yield from self._rows(part.name, file)
        except (pa.ArrowException, OSError):
            yield CorpusRow(key=part.name, caption=None, uri=None, fault=_DAMAGED)

    def _rows(self, name: str, file: pq.ParquetFile) -> Iterator[CorpusRow]:
        role = self._roles
        image = role.get("image")
        cell = _cell(file.schema_arrow.field(image).type) if image else None
        wanted = {role[name] for name in ("caption", "key", "modality") if name in role} | set(self.labels)
        paths = image if image and cell is None else f"{image}.path" if image and cell == ".bytes" else None
        filled = _filled(file, f"{image}{cell}") if cell is not None else None
        classes = _class_names(file.schema_arrow)
        row = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=[*sorted(wanted), *([paths] if paths else [])]):
            for record in batch.to_pylist():
                inside = None
                if cell is not None and (filled is True or (filled is not None and filled(row))):
                    inside = name + fragment(CELL, f"{image}{cell}", row)
                path = record.get(image) if image else None
                path = path.get("path") if isinstance(path, dict) else path
                yield from self._row(record, (inside, path, f"{name}:{row}"), classes)
                row += 1

    def _row(
        self, record: dict[str, Any], names: tuple[str | None, str | None, str], classes: dict[str, list[str]]
    ) -> Iterator[CorpusRow]:
        inside, path, fallback = names
        role = self._roles
        key = as_label(record.get(role["key"])) if "key" in role else None
        row = CorpusRow(
            key=key or (path if inside is None else None) or fallback,
            caption=None,
            uri=inside or path or None,
            modality=first_text(_named(record, role["modality"], classes)) if "modality" in role else None,
            labels={label: as_label(_named(record, label, classes)) for label in self.labels},
        )
        if "caption" in role:
            yield from caption_rows(row, caption_list(record.get(role["caption"])), self.captions)
        else:
            yield row


def _cell(kind: pa.DataType) -> str | None:
    """Where the bytes are below the column: '' itself, '.bytes' in Hugging Face's struct; None for paths."""
    if _binary(kind):
        return ""
    if pa.types.is_struct(kind) and any(field.name == "bytes" and _binary(field.type) for field in kind):
        return ".bytes"
    return None


def _binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    if _binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return pa.types.is_nested(kind) and any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _filled(file: pq.ParquetFile, column: str) -> Any:
    """True when no cell of the column is null by the file's own statistics; else a function that says it of a row.

    Asking the cells themselves would read every image while the corpus is listed.
    """
    metadata = file.metadata
    nulls: list[int | None] = []
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        chunks = (info.column(index) for index in range(info.num_columns))
        chunk = next((chunk for chunk in chunks if chunk.path_in_schema == column), None)
        statistics = chunk.statistics if chunk is not None else None
        nulls.append(statistics.null_count if statistics is not None and statistics.has_null_count else None)
    if all(count == 0 for count in nulls):
        return True
    ends: list[int] = []
    masks: list[Any] = []
    for group, count in enumerate(nulls):
        rows = metadata.row_group(group).num_rows
        ends.append((ends[-1] if ends else 0) + rows)
        masks.append(count == 0 if count in (0, rows) else _mask(file, group, column))

    def is_filled(row: int) -> bool:
        group = next(index for index, end in enumerate(ends) if row < end)
        mask = masks[group]
        return bool(mask if isinstance(mask, bool) else mask[row - (ends[group - 1] if group else 0)])

    return is_filled


def _mask(file: pq.ParquetFile, group: int, column: str) -> list[bool]:
    """Which cells of a row group are there, a few images at a time."""

    mask: list[bool] = []
    for batch in file.iter_batches(16, row_groups=[group], columns=[column]):
        mask += leaf(batch, column).is_valid().to_pylist()
    return mask


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Hugging Face's ClassLabel columns hold numbers; the names stand in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature["names"], list)
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _named(record: dict[str, Any], column: str, classes: dict[str, list[str]]) -> Any:
    value = record.get(column)
    names = classes.get(column)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
