"""Corpora listed in a CSV, TSV or JSONL file, with images in a folder beside it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import field_validator

from mmkd.extract.corpora.captions import Captions, caption_list, caption_rows
from mmkd.extract.corpora.columns import TableColumns, label_names, roles
from mmkd.extract.corpora.files import FileCorpus, unlistable
from mmkd.extract.corpora.records import Dialect, Record, json_records, known_encoding, separated_records
from mmkd.extract.corpora.row import CorpusRow, Part, as_label, first_text
from mmkd.store.errors import CorpusError
from mmkd.store.place import Place

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


class TableCorpus(FileCorpus):
    """A table of image paths and captions. As YAML, this is the content of `corpus.yaml`."""

    kind: Literal["table"] = "table"
    images: str | None = None
    """Folder that image paths are relative to; the table's own folder when not given."""
    columns: TableColumns = TableColumns()
    label_columns: tuple[str, ...] | None = None
    """Columns that pass into the sample table; all others when not given."""
    captions: Captions = "first"
    """Of a JSON list of captions the first that is not blank, or a row for each."""
    column_names: tuple[str, ...] | None = None
    """Names of the columns of a CSV or TSV without a header."""
    encoding: str = "utf-8"
    """Of the file. A byte order mark goes before it."""
    delimiter: str | None = None
    """One character; comma for .csv, tabulator for .tsv when not given."""
    quotes: bool = True
    """False where a quotation mark is an ordinary character."""

    suffixes = TABLE_SUFFIXES

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

    @property
    def root(self) -> str:
        """The image folder, absolute."""
        return str(self.base if self.images is None else Place.of(self.images).resolved())

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in the table's order; of JSONL, every name that any line has."""
        if self.label_columns is None and self.place.suffix == ".jsonl":
            header = list(dict.fromkeys(name for record in self._records() for name in record.values))
        else:
            header = list(self._header)
        return label_names(self.label_columns, self._roles, header, self.path)

    def parts(self) -> Sequence[Part]:
        """The table; its stamp is the SHA-256 of its bytes, so that a mere copy is the same corpus."""
        try:
            with self.place.open() as file:
                content = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # typeshed wants readinto of IO
                return [Part(self.place.name, self.place.listed().size, content.hexdigest())]
        except OSError as error:
            raise unlistable(self.place, error) from error

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """One row per line of the table.

        Raises:
            CorpusError: a named column is not there, or the file is not such a table.
        """
        _ = self.labels, self._roles  # an empty table, or one without such columns, is said before the first row
        for number, record in enumerate(self._records()):
            yield from self._rows(number, record)

    def _rows(self, number: int, record: Record) -> Iterator[CorpusRow]:
        role, values = self._roles, record.values
        image = _text(values, role.get("image"))
        row = CorpusRow(
            key=(_text(values, role.get("key")) if "key" in role else image) or f"line-{number + 1}",
            caption=None,
            uri=image or None,
            modality=first_text(values.get(role["modality"])) if "modality" in role else None,
            labels={label: as_label(values.get(label)) for label in self.labels},
            fault=record.fault,
        )
        if "caption" in role:
            captions = caption_list(values.get(role["caption"]))
            yield from caption_rows(row, captions, self.captions)
        else:
            yield row

    @functools.cached_property
    def _header(self) -> tuple[str, ...]:
        first = next(self._records(), None)
        if first is None:
            raise CorpusError(f"{self.path} has no rows; expected a header and one line per image-text pair")
        return tuple(first.values)

    @functools.cached_property
    def _roles(self) -> dict[str, str]:
        return roles(self.columns, self._header, self.path)

    def _records(self) -> Iterator[Record]:
        try:
            with self.place.open() as file:
                if self.place.suffix == ".jsonl":
                    yield from json_records(file, self.path, self.encoding)
                    return
                delimiter = self.delimiter or ("\t" if self.place.suffix == ".tsv" else ",")
                dialect = Dialect(delimiter, self.quotes, self.encoding, self.column_names)
                yield from separated_records(file, self.path, dialect)
        except OSError as error:
            raise unlistable(self.place, error) from error


def _text(values: Mapping[str, Any], column: str | None) -> str:
    value = values.get(column) if column is not None else None
    return as_label(value) or ""
