"""Corpora listed in CSV, TSV or JSONL files, with images in a folder beside them."""

import codecs
import csv
import functools
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from string import Formatter
from typing import IO, Any, Literal, NamedTuple

from pydantic import field_validator

from mmkd.base.errors import CorpusError
from mmkd.extract.corpora.files import TABLES, corpus_errors
from mmkd.extract.corpora.row import BYTE_ORDER_MARKS, UNDECODABLE_BYTES, CorpusRow, Ignored, Part, as_label
from mmkd.extract.corpora.tabular import Image, TabularCorpus

# Longer fields and lines are parsing accidents; csv's own default stops at 131072, which some captions pass.
_MAX_LINE = 1 << 26
# A quotation mark that is never closed swallows the rest of the file into one caption.
_MAX_LINES_A_FIELD = 1000


class Record(NamedTuple):
    """One line: its values by column, its fault, and the names of its table's columns."""

    values: Mapping[str, Any]
    fault: str | None
    header: Sequence[str]


class TableCorpus(TabularCorpus):
    """A table of image paths and captions, or a folder of tables with the same columns."""

    kind: Literal["table"] = "table"
    caption_template: str | None = None
    """Makes the caption of columns, for clinical tables: `{age}-year-old {sex}`. Where a cell is empty: unknown."""
    image_template: str | None = None
    """Makes the image's path of columns, for tables that leave out the suffix: `{ID}.jpg`."""
    column_names: tuple[str, ...] | None = None
    """Names of the columns of a CSV or TSV without a header."""
    encoding: str = "utf-8"
    """Encoding of the file. A byte order mark takes precedence."""
    delimiter: str | None = None
    """One character; when not given, the one of comma, tabulator, semicolon and bar that divides the header most."""
    quotes: bool = True
    """False where a quotation mark is an ordinary character."""

    suffixes = TABLES
    by_content = True

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, name: str) -> str:
        try:
            b"".decode(name)
            return codecs.lookup(name).name
        except LookupError as error:
            raise ValueError(f"encoding is {name!r}, expected a name such as utf-8, latin-1 or cp1252") from error

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"'):
            yield f"delimiter is {self.delimiter!r}, expected one character"

    @field_validator("caption_template", "image_template")
    @classmethod
    def _template_names_columns(cls, template: str | None) -> str | None:
        if template is not None and not template_columns(template):
            raise ValueError(f"template {template!r} names no column; write {{age}} where the cell goes")
        return template

    @functools.cached_property
    def header(self) -> tuple[str, ...]:
        """Columns of the first table; of JSONL, every name that any line has. Raises CorpusError if there is no table,
        or it has no rows."""
        if not (files := self.files()):
            raise CorpusError(f"corpus {self.path} holds no {', '.join(self.suffixes)} file; name the table")
        if (first := next(self._records(files[0].name), None)) is None:
            raise CorpusError(f"{self.path} has no rows; expected a header and one line per image-text pair")
        if not _is_jsonl(files[0].name):
            return tuple(first.header)
        lines = (record for file in files if _is_jsonl(file.name) for record in self._records(file.name))
        return tuple(dict.fromkeys(name for record in lines for name in record.header))

    @functools.cached_property
    def made(self) -> Mapping[str, Sequence[str]]:
        templates = {"image": self.image_template, "caption": self.caption_template}
        return {role: template_columns(template) for role, template in templates.items() if template}

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """Yield one row per line of the table. Raises CorpusError if a column is missing, or it is no table."""
        roles, number = self.roles, 0  # an empty table is refused before the first row
        many = len(self.files()) > 1
        folder = part.name.rpartition("/")[0] if self.images is None else ""
        for number, record in enumerate(self._records(part.name), 1):
            if number == 1 and many and not _is_jsonl(part.name):
                yield from self.check_columns(record.header, part.name)
            values = record.values
            caption, paths = None, _paths(values.get(roles["image"])) if "image" in roles else []
            if self.image_template is not None:
                cells = {name: as_label(values.get(name)) for name in self.made["image"]}
                paths = [self.image_template.format_map(cells)] if all(cells.values()) else []
            if self.caption_template is not None:
                cells = {name: as_label(values.get(name)) or "unknown" for name in self.made["caption"]}
                caption = self.caption_template.format_map(cells)
            images: list[Image] = [(None, posixpath.join(folder, path)) for path in paths]
            line = f"{part.name}:{number}" if many else f"line-{number}"
            yield from self.line_rows(values, images, line, part.name, caption=caption, fault=record.fault)
        if not number:
            yield Ignored("file: has no rows", part.name)

    def _records(self, name: str) -> Iterator[Record]:
        with corpus_errors(self.place), self.open_part(Part(name, 0, "")) as file:
            lines = _lines(file, self.path, self.encoding)
            yield from _json_records(lines, self.path) if _is_jsonl(name) else self._cells(name, lines)

    def _cells(self, name: str, lines: Iterator[str]) -> Iterator[Record]:
        """Yield records of a CSV or TSV. Empty lines are skipped; a line with too many or too few cells is a fault.
        Columns without a name are left out. Where a name of the header has blanks around it, so may the cells. Raises
        CorpusError for a quotation mark that is never closed."""
        csv.field_size_limit(_MAX_LINE)
        first = next((line for line in lines if line.strip()), "")
        delimiter = self.delimiter or ("\t" if name.lower().endswith(".tsv") else None)
        if delimiter is None and first.startswith("sep=") and len(first.strip("\r\n")) == len("sep=,"):  # Excel's
            delimiter, first = first[4], next(lines, "")
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if self.quotes else csv.QUOTE_NONE
        headers = {
            mark: next(csv.reader([first.rstrip("\r\n")], delimiter=mark, quoting=quoting), [])
            for mark in ([delimiter] if delimiter else ",\t;|")
        }
        delimiter, names = max(headers.items(), key=lambda found: len(found[1]))
        blanks = not self.column_names and any(cell != cell.strip() for cell in names)
        odd = [False]

        def counted() -> Iterator[str]:
            for line in chain([first], lines):
                odd[0] ^= line.count('"') % 2 == 1
                yield line

        reader = csv.reader(counted(), delimiter=delimiter, quoting=quoting, skipinitialspace=blanks)
        header, line = list(self.column_names) if self.column_names else None, 0
        try:
            for raw in reader:
                cells = [cell.strip() for cell in raw] if blanks else raw
                spanned, line = reader.line_num - line, reader.line_num
                # Two marks a field, and two for one inside it: only one that is never closed makes the number odd.
                unclosed, odd[0] = odd[0] and spanned > 1 and self.quotes, False
                if spanned > _MAX_LINES_A_FIELD:
                    raise CorpusError(
                        f"{self.path} line {line - spanned + 1}: a quotation mark is not closed within "
                        f"{_MAX_LINES_A_FIELD} lines; close it, or say `quotes: false` in a corpus.yaml"
                    )
                if len(cells) < 2 and not "".join(cells).strip():
                    continue
                if header is None:
                    header = cells
                    continue
                fault = None
                if unclosed:
                    fault = "row: a quotation mark is not closed"
                elif any(cell.strip() for cell in cells[len(header) :]):
                    fault = "row: more cells than columns"
                elif len(cells) < len(header):
                    fault = "row: fewer cells than columns"
                yield Record({name: cells[i] if i < len(cells) else "" for i, name in enumerate(header)}, fault, header)
        except csv.Error as error:
            raise CorpusError(f"{self.path} line {reader.line_num}: {error}; is it a table of text?") from error


def _lines(file: IO[bytes], where: str, encoding: str) -> Iterator[str]:
    beginning = file.read(4)
    marks = ((mark, name) for mark, name in BYTE_ORDER_MARKS if beginning.startswith(mark))
    mark, found = next(marks, (b"", encoding))
    file.seek(len(mark))
    # Bytes that are not in the encoding must not cost the lines around them: they survive as surrogates.
    text = io.TextIOWrapper(file, encoding=found, errors=UNDECODABLE_BYTES, newline="")
    while line := text.readline(_MAX_LINE):
        if len(line) >= _MAX_LINE:
            raise CorpusError(f"{where} has a line of more than {_MAX_LINE >> 20} MB; is it a table?")
        yield line


def _json_records(lines: Iterator[str], where: str) -> Iterator[Record]:
    """Yield records of a JSONL file; empty lines are skipped, and a bad line after the first is a fault of its own."""
    first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_object)
            found = "null" if record is None else type(record).__name__
            problem = f"line {number} holds {found}, expected an object per line (`jq -c '.[]'` makes them)"
        except (ValueError, RecursionError) as error:
            record, problem = None, f"line {number} is not JSON: {error}"
            if first and line.lstrip().startswith("["):
                problem = "is a JSON array, expected an object per line; convert it: jq -c '.[]' OLD > NEW.jsonl"
        if isinstance(record, dict):
            yield Record(record, None, tuple(record))
        elif first:
            raise CorpusError(f"{where} {problem}")
        else:
            fault = "row: a field stands twice" if problem.endswith(_TWICE) else "row: not a JSON object"
            yield Record({}, fault, ())
        first = False


_TWICE = "a field stands twice"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(_TWICE)
    return values


def template_columns(template: str) -> tuple[str, ...]:
    """Return columns that a template names. Raises ValueError for anything but `{column}` in braces."""
    pieces = [piece for piece in Formatter().parse(template) if piece[1] is not None]
    for _, name, form, conversion in pieces:
        if not name or form or conversion or set(name) & set(".[]"):
            raise ValueError(f"template: expected {{column}}, got {{{name}}}; dots, brackets and formats are not read")
    return tuple(dict.fromkeys(str(name) for _, name, _, _ in pieces))


def _paths(value: object) -> list[str]:
    """Image paths in a cell: a path, a mapping with a `path` (Hugging Face), or a list of these."""
    items = value if isinstance(value, list) else [value]
    found = (as_label(item.get("path") if isinstance(item, dict) else item) for item in items)
    return [path.strip() for path in found if path]


def _is_jsonl(name: str) -> bool:
    return name.lower().endswith(".jsonl")
