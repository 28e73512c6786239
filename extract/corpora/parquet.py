"""Corpora in Parquet: encoded images in cells (Hugging Face's struct of bytes and path too), or paths to files."""

import functools
import json
from collections.abc import Iterator
from itertools import repeat
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.base.errors import CorpusError
from mmkd.base.images.cells import leaf
from mmkd.base.images.uri import CELL, ITEM, fragment
from mmkd.extract.corpora.row import CorpusRow, Ignored, Part, as_label
from mmkd.extract.corpora.tabular import Image, TabularCorpus, label_names, shortest_floats


class ParquetCorpus(TabularCorpus):
    """A Parquet file, or all of a folder and the folders below it, in the order of their paths."""

    kind: Literal["parquet"] = "parquet"

    suffixes = (".parquet",)

    @functools.cached_property
    def _schema(self) -> pa.Schema:
        for part in self.parts():
            try:
                with self.open_part(part) as file:
                    return pq.read_schema(file)
            except (pa.ArrowException, OSError):
                continue
        raise CorpusError(f"corpus {self.path}: none of its files is Parquet")

    @functools.cached_property
    def header(self) -> tuple[str, ...]:
        return tuple(self._schema.names)

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """As for any table. Raises CorpusError, too, if the image column holds neither images nor paths."""
        found = dict(super().roles)
        if (column := found.get("image")) is not None:
            kind = self._schema.field(column).type
            if (cell := _image_cell(kind)) is None:
                raise CorpusError(
                    f"corpus {self.path}: column {column!r} holds {kind}, expected encoded images or paths; "
                    "name the image column in a corpus.yaml: {kind: parquet, path: ..., columns: {image: ...}}"
                )
            if self.images is not None and cell.bytes is not None and cell.path is None:
                raise CorpusError(f"corpus {self.path}: the images are in column {column!r}; leave `images` out")
        return found

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in the table's order; binary ones cannot be labels."""
        roles = self.roles
        binary = {field.name for field in self._schema if field.name and _holds_bytes(field.type)}
        unlisted = binary if self.label_columns else {*binary, *self.beside}
        header = [name for name in self.header if name in roles.values() or name not in unlisted]
        return label_names(self.label_columns, roles, header, self.path)

    @property
    def names_files(self) -> bool:
        """True unless the images are all in cells: reading these again for nothing may take hours."""
        cell = _image_cell(self._schema.field(self.roles["image"]).type) if "image" in self.roles else None
        return cell is not None and cell.path is not None

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """Yield one row per table row; a failed one where the file is damaged. Raises CorpusError if the file lacks a
        column that the first one has."""
        roles = self.roles  # what is no corpus at all is refused before the first row
        try:
            with self.open_part(part) as handle:
                file = pq.ParquetFile(handle, pre_buffer=False)
                yield from self.check_columns(file.schema_arrow.names, part.name)
                yield from self._rows(part.name, file, roles)
                if not file.metadata.num_rows:
                    yield Ignored("file: has no rows", part.name)
        except (pa.ArrowException, OSError):
            fault = "archive: not Parquet, or damaged; what follows is lost"
            yield CorpusRow(key=part.name, caption=None, uri=None, fault=fault)

    def _rows(self, name: str, file: pq.ParquetFile, roles: dict[str, str]) -> Iterator[CorpusRow | Ignored]:
        classes, image = _class_names(file.schema_arrow), roles.get("image", "")
        cell = (_image_cell(file.schema_arrow.field(image).type) if image else None) or _Cell(None, None)
        wanted = {roles[role] for role in ("caption", "key", "modality") if role in roles} | {
            *self.labels,
            *self.beside,
        }
        if cell.listed or cell.path is not None:
            wanted.add(image if cell.listed else f"{image}{cell.path}")
        own_bytes, row = cell.bytes is not None and not cell.listed, 0
        for group in range(file.metadata.num_row_groups):
            filled = _has_bytes(file, group, f"{image}{cell.bytes}") if own_bytes else repeat(False)
            for batch in file.iter_batches(16 if cell.listed else 4096, row_groups=[group], columns=sorted(wanted)):
                for record in shortest_floats(pa.Table.from_batches([batch])).to_pylist():
                    found = _images(record.get(image), cell, name, (image, row), next(filled)) if image else []
                    for column, names in classes.items():
                        number = record.get(column)
                        if isinstance(number, int) and 0 <= number < len(names):
                            record[column] = names[number]
                    yield from self.line_rows(record, found, f"{name}:{row}", name)
                    row += 1


class _Cell(NamedTuple):
    """Subfields with bytes and paths of an image column: '' is the column itself, None absent."""

    bytes: str | None
    path: str | None
    listed: bool = False
    """True where a cell is a list of images."""


def _image_cell(kind: pa.DataType) -> _Cell | None:
    """Return the images of a column of this type; None when it holds neither images nor paths."""
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


def _images(value: Any, cell: _Cell, file: str, at: tuple[str, int], inside: bool) -> list[Image]:
    """Return images of one cell, whose bytes are not read unless it is a list; `inside` is True if it holds some."""
    if not cell.listed:
        path = as_label(value.get("path") if isinstance(value, dict) else value)
        own = file + fragment(CELL, f"{at[0]}{cell.bytes}", at[1]) if inside else None
        return [(own, path)] if own or path else []
    found: list[Image] = []
    for item, one in enumerate(value or []):
        content = one if isinstance(one, dict) else {"path" if cell.bytes is None else "bytes": one}
        if content.get("bytes") is not None:
            found.append((file + fragment(ITEM, *at, item), None))
        elif content.get("path"):
            found.append((None, as_label(content["path"])))
    return found


def _binary(kind: pa.DataType) -> bool:
    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _text(kind: pa.DataType) -> bool:
    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    nested = pa.types.is_nested(kind) and any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return nested or _binary(kind)


def _has_bytes(file: pq.ParquetFile, group: int, column: str) -> Iterator[bool]:
    """Yield for each row of a group whether its cell is not null: by the file's own statistics where these suffice, as
    asking the cells reads every image while the corpus is listed."""
    info = file.metadata.row_group(group)
    chunks = (info.column(index) for index in range(info.num_columns))
    statistics = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == column), None)
    nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
    if nulls in (0, info.num_rows):
        yield from repeat(nulls == 0, info.num_rows)
        return
    for batch in file.iter_batches(16, row_groups=[group], columns=[column]):
        yield from leaf(batch, column).is_valid().to_pylist()


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Hugging Face's ClassLabel columns hold numbers; return the names in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature["names"], list)
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
