"""Corpora listed in CSV, TSV or JSONL files, with images in a folder beside them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, Literal

from pydantic import field_validator

from mmkd.base.errors import CorpusError
from mmkd.base.places.reading import Listed
from mmkd.base.places.remote import as_root
from mmkd.extract.corpora.captions import Choice, caption_rows
from mmkd.extract.corpora.columns import TableColumns, ignored_columns, label_names, roles
from mmkd.extract.corpora.files import FileCorpus, unlistable
from mmkd.extract.corpora.records import Dialect, Record, json_records, known_encoding, separated_records
from mmkd.extract.corpora.row import NO_IMAGE, CorpusRow, Ignored, Part, as_label, first_text
from mmkd.extract.corpora.suffixes import DICOM, PICTURES, TABLES


class TableCorpus(FileCorpus):
    """A table of image paths and captions, or a folder of tables with the same columns.

    As YAML, this is the content of `corpus.yaml`.
    """

    kind: Literal["table"] = "table"
    images: str | None = None
    """Folder that image paths are relative to; the table's own folder when not given."""
    columns: TableColumns = TableColumns()
    label_columns: tuple[str, ...] | None = None
    """Columns that pass into the sample table; all others when not given."""
    captions: Choice = "first"
    """Of a JSON list of captions the first that is not blank, or a row for each."""
    pictures: Choice = "first"
    """Of a JSON list of image paths the first, or a row for each."""
    shard_keys: bool = False
    """Keys are `TABLE/KEY`, for tables that number their rows alike."""
    caption_template: str | None = None
    """Makes the caption of columns, for clinical tables: `{age}-year-old {sex}`. Where a cell is empty: unknown."""
    image_template: str | None = None
    """Makes the image's path of columns, for tables that leave out the suffix: `{ID}.jpg`."""
    column_names: tuple[str, ...] | None = None
    """Names of the columns of a CSV or TSV without a header."""
    encoding: str = "utf-8"
    """Of the file. A byte order mark goes before it."""
    delimiter: str | None = None
    """One character; when not given, the one of comma, tabulator, semicolon and bar that divides the header."""
    quotes: bool = True
    """False where a quotation mark is an ordinary character."""

    suffixes = TABLES
    named_by_rows = (*PICTURES, *DICOM)

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, name: str) -> str:
        return known_encoding(name)

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_one_character(cls, text: str | None) -> str | None:
        if text is not None and (len(text) != 1 or text in '\r\n"'):
            raise ValueError(f"delimiter is {text!r}, expected one character")
        return text

    @field_validator("caption_template", "image_template")
    @classmethod
    def _template_names_columns(cls, template: str | None) -> str | None:
        if template is not None and not template_columns(template):
            raise ValueError(f"template {template!r} names no column; write {{age}} where the cell goes")
        return template

    @property
    def root(self) -> str:
        """The image folder, absolute."""
        return str(self.base if self.images is None else as_root(self.images).resolve())

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in the table's order; of JSONL, every name that any line has."""
        header = self._names if self.label_columns is None else self._header
        return label_names(self.label_columns, self._roles, header, self.path)

    @property
    def _names(self) -> tuple[str, ...]:
        """The header; of JSONL, every name that any line of the first table has."""
        first = self._first.name
        if not first.lower().endswith(".jsonl"):
            return self._header
        return tuple(dict.fromkeys(name for record in self._records(first) for name in record.values))

    def parts(self) -> Sequence[Part]:
        """The tables; a stamp is the SHA-256 of the bytes, so that a mere copy is the same corpus."""
        return [self.hashed_part(file) for file in self.listed()]

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """One row per line of the table.

        Raises:
            CorpusError: a named column is not there, or the file is not such a table.
        """
        needed = (*self._roles.values(), *self.labels)  # an empty table is refused before the first row
        many = len(self.listed()) > 1
        for number, record in enumerate(self._records(part.name)):
            if number == 0 and many and not part.name.lower().endswith(".jsonl"):
                missing = [name for name in needed if name not in record.values]
                if missing:
                    raise CorpusError(
                        f"{self.path}: {part.name} has no column {missing[0]!r}, which the first table has"
                    )
            line = f"{part.name}:{number + 1}" if many else f"line-{number + 1}"
            before = f"{part.name.rpartition('.')[0]}/" if self.shard_keys else ""
            yield from self._rows(record, line, before, part.name.rpartition("/")[0] if self.images is None else "")

    def ignored(self) -> Iterator[Ignored]:
        """Files that are no table, and columns that are neither a role nor a label."""
        yield from super().ignored()
        if self.label_columns is not None:
            used = (*self._roles.values(), *self.labels, *template_columns(self.caption_template or ""),
                    *template_columns(self.image_template or ""))  # fmt: skip
            yield from ignored_columns(self._names, used, "not among `label_columns`")
        unnamed = next((record.unnamed for record in self._records(self._first.name)), 0)
        if unnamed:
            yield Ignored("column: without a name", self._first.name, unnamed)

    def _rows(self, record: Record, line: str, before: str, folder: str) -> Iterator[CorpusRow | Ignored]:
        """One line's rows; image paths are relative to the `folder` of the table."""
        role, values = self._roles, record.values
        images = _texts(values.get(role["image"])) if "image" in role else []
        if self.image_template is not None:
            cells = {name: _text(values, name) for name in template_columns(self.image_template)}
            images = [self.image_template.format_map(cells)] if all(cells.values()) else []
        if len(images) > 1 and self.pictures == "first":
            yield Ignored("image: a further one of its line (`pictures: each` takes all)", images[1], len(images) - 1)
            del images[1:]
        for number, path in enumerate(images or [""]):
            image = f"{folder}/{path}" if folder and path and not path.startswith("/") else path
            key = _text(values, role.get("key"))
            row = CorpusRow(
                key=before + (f"{key}@{number}" if key and number else key or image or line),
                caption=None,
                uri=self.image_uri(image, self._root) if image else None,
                modality=first_text(values.get(role["modality"])) if "modality" in role else None,
                labels={label: as_label(values.get(label)) for label in self.labels},
                fault=record.fault,
                if_taken=None if key or not image else line,
            )
            if self.caption_template is not None:
                cells = {name: _text(values, name) or "unknown" for name in template_columns(self.caption_template)}
                yield dataclasses.replace(row, caption=self.caption_template.format_map(cells))
            elif "caption" in role:
                if not image and ("image" in role or self.image_template):
                    row = dataclasses.replace(row, fault=row.fault or NO_IMAGE)
                yield from caption_rows(row, values.get(role["caption"]), self.captions)
            else:
                yield row

    @functools.cached_property
    def _root(self) -> str:
        return self.root

    @functools.cached_property
    def _first(self) -> Listed:
        """The table whose header counts."""
        files = self.listed()
        if not files:
            raise CorpusError(f"corpus {self.path} holds no {', '.join(self.suffixes)} file; name the table")
        return files[0]

    @functools.cached_property
    def _header(self) -> tuple[str, ...]:
        first = next(self._records(self._first.name), None)
        if first is None:
            raise CorpusError(f"{self.path} has no rows; expected a header and one line per image-text pair")
        header = tuple(first.values)
        for role in ("caption_template", "image_template"):
            missing = [name for name in template_columns(getattr(self, role) or "") if name not in header]
            if missing:
                raise CorpusError(
                    f"{self.path} has no column {missing[0]!r} (for the {role}); it has {', '.join(header[:20])}"
                )
        return header

    @functools.cached_property
    def _roles(self) -> dict[str, str]:
        return roles(self.columns, self._header, self.path, made=bool(self.caption_template or self.image_template))

    def _records(self, name: str) -> Iterator[Record]:
        with self.opened(Part(name, 0, "")) as file:
            try:
                if name.lower().endswith(".jsonl"):
                    yield from json_records(file, self.path, self.encoding)
                    return
                delimiter = self.delimiter or ("\t" if name.lower().endswith(".tsv") else None)
                dialect = Dialect(delimiter, self.quotes, self.encoding, self.column_names)
                yield from separated_records(file, self.path, dialect)
            except OSError as error:
                raise unlistable(self.place, error) from error


def template_columns(template: str) -> tuple[str, ...]:
    """Columns that a template names.

    Raises:
        ValueError: its braces are not in order, or it asks for more than a column's cell.
    """
    pieces = [piece for piece in Formatter().parse(template) if piece[1] is not None]
    for _, name, form, conversion in pieces:
        if not name or form or conversion or set(name) & set(".[]"):
            raise ValueError(f"template: expected {{column}}, got {{{name}}}; dots, brackets and formats are not read")
    return tuple(dict.fromkeys(str(name) for _, name, _, _ in pieces))


def _texts(value: object) -> list[str]:
    """Image paths in a cell: a path, or a list of them."""
    return [
        text for item in (value if isinstance(value, list) else [value]) if (text := (as_label(item) or "").strip())
    ]


def _text(values: Mapping[str, Any], column: str | None) -> str:
    value = values.get(column) if column is not None else None
    return as_label(value) or ""
