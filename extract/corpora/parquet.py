"""Corpora in Parquet: encoded images in cells (Hugging Face's struct of bytes and path too), or paths to files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.base.errors import CorpusError
from mmkd.base.images.parquet import leaf
from mmkd.base.images.uri import CELL, ITEM, fragment
from mmkd.base.places.remote import as_root
from mmkd.extract.corpora.captions import Choice, caption_rows
from mmkd.extract.corpora.columns import TableColumns, ignored_columns, label_names, roles
from mmkd.extract.corpora.files import FileCorpus
from mmkd.extract.corpora.row import NO_IMAGE, CorpusRow, Ignored, Part, as_label, first_text
from mmkd.extract.corpora.suffixes import DICOM, PICTURES

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
    captions: Choice = "first"
    """Of a list of captions the first that is not blank, or a row for each."""
    pictures: Choice = "first"
    """Of a list of images the first, or a row for each."""
    shard_keys: bool = False
    """Keys are `FILE/KEY`, for files that number their rows alike."""

    suffixes = (".parquet",)
    named_by_rows = (*PICTURES, *DICOM)

    @property
    def root(self) -> str:
        """The folder that Parquet files and image paths are below."""
        return str(self.base if self.images is None else as_root(self.images).resolve())

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
        if "image" in found:
            kind = self._schema.field(found["image"]).type
            cell = _image_cell(kind)
            if cell is None:
                raise CorpusError(
                    f"corpus {self.path}: column {found['image']!r} holds {kind}, expected encoded images or paths; "
                    "name the image column in a corpus.yaml: {kind: parquet, path: ..., columns: {image: ...}}"
                )
            if self.images is not None and cell.bytes is not None and cell.path is None:
                raise CorpusError(
                    f"corpus {self.path}: the images are in column {found['image']!r}; leave `images` out"
                )
        return found

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in the table's order; binary ones cannot be labels."""
        plain = [field.name for field in self._schema if not _holds_bytes(field.type)]
        header = [name for name in self._schema.names if name in plain or name in self._roles.values()]
        return label_names(self.label_columns, self._roles, header, self.path)

    def ignored(self) -> Iterator[Ignored]:
        """Files that are not Parquet, and columns that are neither a role nor a label."""
        yield from super().ignored()
        why = "holds bytes" if self.label_columns is None else "not among `label_columns`"
        yield from ignored_columns(self._schema.names, (*self._roles.values(), *self.labels), why)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """One row per table row; a failed one where the file is damaged.

        Raises:
            CorpusError: the file lacks a column that the first one has.
        """
        wanted = (*self._roles.values(), *self.labels)
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

    def _rows(self, name: str, file: pq.ParquetFile) -> Iterator[CorpusRow | Ignored]:
        role = self._roles
        image = role.get("image")
        cell = _image_cell(file.schema_arrow.field(image).type) if image else None
        wanted = {role[name] for name in ("caption", "key", "modality") if name in role} | set(self.labels)
        if image and cell is not None and not cell.listed:
            filled = _filled(file, f"{image}{cell.bytes}") if cell.bytes is not None else None
            paths = [f"{image}{cell.path}"] if cell.path is not None else []
        else:
            filled, paths = None, [image] if image else []
        classes = _class_names(file.schema_arrow)
        row = 0
        before = f"{name.rpartition('.')[0]}/" if self.shard_keys else ""
        for batch in file.iter_batches(
            _BATCH_ROWS if not (cell and cell.listed) else 16, columns=[*sorted(wanted), *paths]
        ):
            for record in batch.to_pylist():
                found: list[tuple[str | None, str | None]] = []
                if image and cell is not None and cell.listed:
                    for item, value in enumerate(record.get(image) or []):
                        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (
                            (value, None) if cell.bytes is not None else (None, value))  # fmt: skip
                        if data is not None:
                            found.append((name + fragment(ITEM, image, row, item), None))
                        elif path:
                            found.append((None, str(path)))
                elif image and cell is not None:
                    inside = filled is True or (filled is not None and filled(row))
                    path = record.get(image)
                    path = path.get("path") if isinstance(path, dict) else path
                    found.append(
                        (name + fragment(CELL, f"{image}{cell.bytes}", row) if inside else None, as_label(path))
                    )
                yield from self._row_images(record, before, f"{name}:{row}", found, classes)
                row += 1

    def _row_images(
        self,
        record: dict[str, Any],
        before: str,
        line: str,
        found: list[tuple[str | None, str | None]],
        classes: dict[str, list[str]],
    ) -> Iterator[CorpusRow | Ignored]:
        """Rows of one line; `found` has for each image its place inside the file, or its path."""
        role = self._roles
        if len(found) > 1 and self.pictures == "first":
            yield Ignored("image: a further one of its line (`pictures: each` takes all)", line, len(found) - 1)
            del found[1:]
        given = as_label(record.get(role["key"])) if "key" in role else None
        for number, (inside, path) in enumerate(found or [(None, None)]):
            key = given or (path if inside is None else None) or line
            row = CorpusRow(
                key=before + (f"{key}@{number}" if number and key in (given, line) else key),
                caption=None,
                uri=inside or (self.image_uri(path, self._root) if path else None),
                modality=first_text(_named(record, role["modality"], classes)) if "modality" in role else None,
                labels={label: as_label(_named(record, label, classes)) for label in self.labels},
                if_taken=line if key == path else None,
            )
            if "caption" in role:
                if "image" in role and row.uri is None:
                    row = dataclasses.replace(row, fault=NO_IMAGE)
                yield from caption_rows(row, record.get(role["caption"]), self.captions)
            else:
                yield row

    @functools.cached_property
    def _root(self) -> str:
        return self.root


class _Cell(NamedTuple):
    """Where an image column has bytes and paths: '' in the column itself, or below it; None where it has none."""

    bytes: str | None
    path: str | None
    listed: bool = False
    """True where a cell is a list of images."""


def _image_cell(kind: pa.DataType) -> _Cell | None:
    """The images of a column of this type; None when it holds neither images nor paths."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return _Cell(None, None)
    if _binary(kind):
        return _Cell("", None)
    if _text(kind):
        return _Cell(None, "")
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        data = ".bytes" if "bytes" in fields and _binary(fields["bytes"]) else None
        path = ".path" if "path" in fields and _text(fields["path"]) else None
        return _Cell(data, path) if data or path else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _image_cell(kind.value_type)
        return None if inner is None or inner.listed else inner._replace(listed=True)
    return None


def _binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    if _binary(kind):
        return True
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
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
