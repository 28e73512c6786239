"""Lines of CSV, TSV and JSONL as records; a line that cannot be parsed is one failed row."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, Literal

from mmkd.base.errors import CorpusError
from mmkd.extract.corpora.row import BYTE_ORDER_MARKS, UNDECODABLE_BYTES

# Longer fields and lines are parsing accidents; csv's own default stops at 131072, which some captions pass.
_MAX_LINE = 1 << 26
# A quotation mark that is never closed swallows the rest of the file into one caption.
_MAX_LINES_A_FIELD = 1000


@dataclass(frozen=True)
class Record:
    """One line: its values by column, and its fault as a whole."""

    values: dict[str, Any]
    fault: str | None = None
    unnamed: int = 0
    """Columns without a name in the header; their cells are left out."""


@dataclass(frozen=True)
class Dialect:
    """How a CSV or TSV is written."""

    delimiter: str | None
    """When None, the one of comma, tabulator, semicolon and bar (a .tsv: tabulator) that divides the header."""
    quotes: bool
    encoding: str
    names: tuple[str, ...] | None
    """Of the columns, where the file has no header."""


def known_encoding(name: str) -> str:
    """The encoding's canonical name.

    Raises:
        ValueError: Python has no such text encoding.
    """
    try:
        b"".decode(name)
        return codecs.lookup(name).name
    except LookupError as error:
        raise ValueError(f"encoding is {name!r}, expected a name such as utf-8, latin-1 or cp1252") from error


def _lines(file: IO[bytes], where: str, encoding: str) -> Iterator[str]:
    beginning = file.read(4)
    marks = ((mark, name) for mark, name in BYTE_ORDER_MARKS if beginning.startswith(mark))
    mark, found = next(marks, (b"", encoding))
    file.seek(len(mark))
    # Bytes that are not in the encoding must not cost the lines around them: they survive as surrogates.
    text = io.TextIOWrapper(file, encoding=found, errors=UNDECODABLE_BYTES, newline="")
    try:
        while line := text.readline(_MAX_LINE):
            if len(line) >= _MAX_LINE:
                raise CorpusError(f"{where} has a line of more than {_MAX_LINE >> 20} MB; is it a table?")
            yield line
    finally:
        text.detach()


def separated_records(file: IO[bytes], where: str, dialect: Dialect) -> Iterator[Record]:
    """Records of a CSV or TSV. Empty lines are skipped; a line with too many or too few cells is a fault.

    Columns without a name are left out. Where a name of the header has blanks around it, so may the cells.

    Raises:
        CorpusError: a header that names a column twice, or a quotation mark that is never closed.
    """
    csv.field_size_limit(_MAX_LINE)
    odd = [False]

    def counted() -> Iterator[str]:
        for line in _lines(file, where, dialect.encoding):
            odd[0] ^= line.count('"') % 2 == 1
            yield line

    lines = counted()
    first = next(lines, "")
    delimiter = dialect.delimiter or next((mark for mark in ",\t;|" if mark in first), ",")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE
    names = next(csv.reader([first.rstrip("\r\n")], delimiter=delimiter, quoting=quoting), [])
    blanks = not dialect.names and any(name != name.strip() for name in names)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, quoting=quoting, skipinitialspace=blanks)
    header = list(dialect.names) if dialect.names else None
    line = 0
    try:
        for raw in reader:
            cells = [cell.strip() for cell in raw] if blanks else raw
            spanned, line = reader.line_num - line, reader.line_num
            # Two marks a field, and two for one inside it: only one that is never closed makes the number odd.
            unclosed, odd[0] = odd[0] and spanned > 1 and dialect.quotes, False
            if spanned > _MAX_LINES_A_FIELD:
                raise CorpusError(
                    f"{where} line {line - spanned + 1}: a quotation mark is not closed within {_MAX_LINES_A_FIELD} "
                    "lines; close it, or say `quotes: false` in a corpus.yaml"
                )
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, where)
                continue
            yield _separated(header, cells, unclosed)
    except csv.Error as error:
        raise CorpusError(f"{where} line {reader.line_num}: {error}; is it a table of text?") from error


def _separated(header: list[str], cells: list[str], unclosed: bool) -> Record:
    fault = None
    if unclosed:
        fault = "row: a quotation mark is not closed"
    elif len(cells) > len(header):
        fault = "row: more cells than columns"
    elif len(cells) < len(header):
        fault = "row: fewer cells than columns"
    values = {name: cells[i] if i < len(cells) else "" for i, name in enumerate(header) if name}
    return Record(values, fault, header.count(""))


def _checked_header(cells: list[str], where: str) -> list[str]:
    twice = next((name for name in cells if name and cells.count(name) > 1), None) if len(cells) <= 4096 else cells[0]
    if twice is not None:
        raise CorpusError(f"{where} has two columns named {twice!r}; name each once, or give `column_names`")
    return cells


def json_records(file: IO[bytes], where: str, encoding: str) -> Iterator[Record]:
    """Records of a JSONL file; empty lines are skipped, and a bad line after the first is a fault of its own.

    Raises:
        CorpusError: the first line is not a JSON object.
    """
    first = True
    for number, line in enumerate(_lines(file, where, encoding), 1):
        if not line.strip():
            continue
        record, problem = None, ""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"line {number} is not JSON: {error}"
            if first and line.lstrip().startswith("["):
                problem = "is a JSON array, expected an object per line; convert it: jq -c '.[]' OLD > NEW.jsonl"
        if record is not None and not isinstance(record, dict):
            problem = (
                f"line {number} holds {type(record).__name__}, expected an object per line (`jq -c '.[]'` makes them)"
            )
        elif record is None and not problem:
            problem = f"line {number} holds null, expected an object per line"
        if problem and first:
            raise CorpusError(f"{where} {problem}")
        first = False
        yield Record({}, "row: not a JSON object") if problem else Record(record or {})
