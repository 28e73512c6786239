"""Common parts of table formats: roles of their columns, labels, and the rows of one line."""

import csv
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError, UnreachableError
from mmkd.base.places.reading import open_file
from mmkd.base.places.remote import StorePath
from mmkd.extract.corpora.files import DICOM, PICTURES, FileCorpus
from mmkd.extract.corpora.row import (
    NO_IMAGE,
    Captions,
    Choice,
    CorpusRow,
    Ignored,
    as_label,
    caption_rows,
    first_text,
    further_captions,
    replace_surrogates,
)
from mmkd.store.evaluation_rows import CANDIDATE, KIND, NEGATIVE, PROMPT
from mmkd.store.samples import FIXED_COLUMNS

# Names that released biomedical corpora use, in the order in which they are tried.
_USUAL = {
    "image": (
        *("image", "filepath", "image_path", "imgpath", "path", "file", "filename", "file_name", "img", "jpg", "png"),
        *("images", "image_bytes", "image.bytes"),
    ),
    "caption": ("caption", "text", "txt", "title", "captions"),
    "key": ("key", "id", "uid", "sample_id"),
    "modality": ("modality",),
}
_MAX_LABELS = 256

Image = tuple[str | None, str | None]
"""Location of one image of a line: its place inside the table's file, or its path."""


class TableColumns(Frozen):
    """Columns by role. A column that is not named is looked for under its usual names, in any case."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    modality: str | None = None


class TabularCorpus(FileCorpus):
    """A table, or all tables of a folder and the folders below it; a row for each line."""

    images: str | None = None
    """Folder that image paths are relative to; the table's own folder when not given."""
    columns: TableColumns = TableColumns()
    label_columns: tuple[str, ...] | None = None
    """Columns that pass into the sample table; all others (but binary ones) when not given."""
    captions: Captions = "first"
    """Use the first nonblank caption of a list, or one row for each; `further`: the first, and rows for texts alone for
    the others of a list, and for the captions of further lines of the same key and image."""
    further: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Columns of further captions, a text or a list of texts in each cell, and the kind of these: `synthetic`, ..."""
    kind_column: str | None = None
    """Column with the kind of the captions of a line that become further ones by `captions: further`."""
    pictures: Choice = "first"
    """Use the first image of a list, or one row for each."""
    shard_keys: bool = False
    """Keys are `FILE/KEY`, for files that number their rows alike."""
    texts: dict[str, tuple[str, ...]] = {KIND: (PROMPT, NEGATIVE, CANDIDATE)}  # noqa: RUF012 - pydantic copies it
    """Rows that are texts on purpose, such as prompts, by the values of a column: such a row lacks no image."""

    named_by_rows = (*PICTURES, *DICOM)

    def faults(self) -> Iterator[str]:
        if self.kind_column and self.captions != "further":
            yield f"kind_column is {self.kind_column!r}, which is of `captions: further`; write that, or leave it out"

    @functools.cached_property
    def header(self) -> tuple[str, ...]:
        """Names of all columns, in order; '' for those without a name."""
        raise NotImplementedError

    @property
    def made(self) -> Mapping[str, Sequence[str]]:
        """Roles that a template fills, and the columns that it takes."""
        return {}

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """Role to column name. Raises CorpusError if a named column is not there, a column is listed twice, or there is
        neither image nor caption."""
        found: dict[str, str] = {}
        header = self.header
        check_names(header, self.path)
        folded = {name.strip().casefold(): name for name in reversed(header)}
        for role, usual in _USUAL.items():
            if (named := getattr(self.columns, role)) is not None and named not in header:
                raise CorpusError(f"{self.path} has no column {named!r} (for the {role}); it has {_some(header)}")
            candidates = (name if name in header else folded.get(name) for name in usual)
            name = named or next((name for name in candidates if name is not None and name not in found.values()), None)
            if name is not None:
                found[role] = name
        needed = {f"{role}_template": names for role, names in self.made.items()}
        if "texts" in self.model_fields_set:
            needed["texts"] = tuple(self.texts)
        needed["further captions"] = self.beside
        for field, names in needed.items():
            if (missing := next((name for name in names if name not in header), None)) is not None:
                raise CorpusError(f"{self.path} has no column {missing!r} (for the {field}); it has {_some(header)}")
        if not {"image", "caption"} & {*found, *self.made}:
            raise CorpusError(
                f"{self.path} has no column for the image or the caption; it has {_some(header)}; "
                "name them in a corpus.yaml: {kind: ..., path: ..., columns: {image: ..., caption: ...}}"
            )
        return found

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        header = [name for name in self.header if name not in self.beside or self.label_columns]
        return label_names(self.label_columns, self.roles, header, self.path)

    @property
    def beside(self) -> tuple[str, ...]:
        """Columns of further captions and of their kinds."""
        return (*self.further, *([self.kind_column] if self.kind_column else ()))

    def ignored(self) -> Iterator[Ignored]:
        """Yield files that are no table, images that no line names, and columns that are neither a role nor a label."""
        yield from super().ignored()
        templates = (name for names in self.made.values() for name in names)
        used = {*self.roles.values(), *self.beside, *self.labels, *templates}
        for name in (name for name in self.header if name not in used):
            unlisted = self.label_columns is not None
            why = "not among `label_columns`" if unlisted else "holds bytes" if name else "without a name"
            yield Ignored(f"column: {why}", name[:60] or self.place.name)

    def check_columns(self, names: Sequence[str], file: str) -> Iterator[Ignored]:
        """Yield columns that only this further file has. Raises CorpusError if it lacks a column that is used."""
        check_names(names, f"{self.path}: {file}")
        if missing := [name for name in (*self.roles.values(), *self.labels, *self.beside) if name not in names]:
            raise CorpusError(f"{self.path}: {file} has no column {missing[0]!r}, which the first table has")
        yield from (Ignored("column: not in the first table", name[:60]) for name in names if name not in self.header)

    def line_rows(
        self,
        values: Mapping[str, Any],
        images: list[Image],
        line: str,
        file: str,
        *,
        caption: str | None = None,
        fault: str | None = None,
    ) -> Iterator[CorpusRow | Ignored]:
        """Yield rows of one line of `file`, which is relative to `base`. `values`: its cells by column. `line`: its key
        if it has no other. `caption`: made by a template. `fault`: of the whole line."""
        roles, before = self.roles, f"{file.rpartition('.')[0]}/" if self.shard_keys else ""
        if len(images) > 1 and self.pictures == "first":
            yield Ignored("image: a further one of its line", line, len(images) - 1)
            del images[1:]
        given = as_label(values.get(roles["key"])) if "key" in roles else None
        further, nested = further_captions(values, self.further, line)
        yield from nested
        is_text = any(as_label(values.get(column)) in wanted for column, wanted in self.texts.items())
        for number, (inside, path) in enumerate(images or [(None, None)]):
            key = given or (path if inside is None else None) or line
            row = CorpusRow(
                key=before + (f"{key}@{number}" if number and key in (given, line) else key),
                caption=caption,
                uri=inside or (self.image_uri(path, self.root) if path else None),
                modality=first_text(values.get(roles["modality"])) if "modality" in roles else None,
                labels={label: as_label(values.get(label)) for label in self.labels},
                fault=fault,
                if_taken=line if key == path or self.captions == "further" else None,
                by_design=is_text and not (inside or path),
                further=further,
                caption_kind=as_label(values.get(self.kind_column)) if self.kind_column else None,
                joins=self.captions == "further",
            )
            if caption is not None or "caption" not in roles:
                yield row
                continue
            if row.uri is None and not row.by_design and "image" in {*roles, *self.made}:
                row = dataclasses.replace(row, fault=fault or NO_IMAGE)
            yield from caption_rows(row, values.get(roles["caption"]), self.captions)


def read_lines(place: StorePath) -> list[dict[str, str | None]]:
    """Return the lines of a table (commas, tabs or semicolons, by its header) or Parquet file as labels by column.
    Raises CorpusError if it cannot be read, a line has too many or too few cells, or a column is listed twice."""
    suffix = place.suffix.lower()
    try:
        with open_file(place) as file:
            if suffix == ".parquet":
                rows = shortest_floats(pq.read_table(file)).to_pylist()
                return [{name: as_label(cell) for name, cell in row.items()} for row in rows]
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            first = text.readline()
            reader = csv.reader(chain([first], text), delimiter=max(",\t;", key=first.count))
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise CorpusError(f"{place} names a column twice: {', '.join(header[:20])}")
            lines: list[dict[str, str | None]] = []
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    raise CorpusError(f"{place} line {reader.line_num} has {len(cells)} cells, expected {len(header)}")
                lines.append(dict(zip(header, map(as_label, cells), strict=True)))
            return lines
    except (OSError, UnreachableError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CorpusError(f"table {place} cannot be read: {reason}; check the path") from error
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"table {place} is neither CSV, TSV nor Parquet: {error}") from error


def shortest_floats(table: pa.Table) -> pa.Table:
    """Columns of float16 and float32 as the numbers that they print as: 0.1, not 0.10000000149011612."""
    for position, field in enumerate(table.schema):
        if field.type in (pa.float16(), pa.float32()):
            numbers = [float(str(number)) for number in table[position].to_numpy()]
            table = table.set_column(position, field.name, pa.array(numbers, pa.float64()))
    return table


def label_names(
    wanted: tuple[str, ...] | None, found: Mapping[str, str], header: Sequence[str], where: object
) -> tuple[str, ...]:
    """Return columns that pass into the sample table: those wanted, else all that have a name and no role. Raises
    CorpusError if one is missing, has the name of a column of the sample table, or there are too many."""
    names = tuple(name for name in header if name and name not in found.values()) if wanted is None else wanted
    if wanted is None and len(names) > _MAX_LABELS:
        raise CorpusError(f"{where} has {len(names)} columns; name some of them as `label_columns` in a corpus.yaml")
    for label in names:
        if label not in header:
            raise CorpusError(f"{where} has no label column {label!r}; it has {_some(header)}")
        if label in FIXED_COLUMNS.names:
            raise CorpusError(
                f"{where}: label column {label!r} has the name of a column of the sample table; "
                f"rename it, or list the others as `label_columns` (taken: {', '.join(FIXED_COLUMNS.names)})"
            )
    return names


def check_names(header: Sequence[str], where: object) -> None:
    """Refuse a header that cannot be one. Raises CorpusError if it names a column twice, or was decoded wrongly."""
    if any("\0" in name for name in header):
        raise CorpusError(f"{where} has NUL characters in its header; if it is UTF-16, say `encoding: utf-16-le`")
    wrong = next((replace_surrogates(name) for name in header if replace_surrogates(name) != name), None)
    if wrong is not None:
        raise CorpusError(f"{where} has a column {wrong[:60]!r}, which is not UTF-8; set `encoding`, or rename it")
    seen: set[str] = set()
    twice = next((name for name in header if name and (name in seen or seen.add(name))), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise CorpusError(f"{where} has two columns named {twice[:60]!r}; name each once, or give `column_names`")


def _some(header: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in header[:20]) + (", ..." if len(header) > 20 else "")
