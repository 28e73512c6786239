"""A table beside the images: clinical columns and published folds, matched by key and never by order."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError
from mmkd.base.text import cell_text
from mmkd.extract.corpora.parquet import shortest_floats
from mmkd.extract.corpora.row import as_label
from mmkd.store.samples import FIXED_COLUMNS

FOLD = "fold"
# Cells of Patho-Bench's fold columns and of CLAM's split files.
_TEST = "test"


class Join(Frozen):
    """Columns of a CSV, TSV or Parquet file for the samples of a corpus."""

    table: str | None = None
    """In a description, relative to it."""
    key: str
    """Column of the table that identifies the line's sample."""
    match: str = "key"
    """Sample field to look up: its `key`, the image's file name (`name`; `stem` without suffix) or a label."""
    columns: tuple[str, ...] | None = None
    """Columns to take; all others when not given."""
    fold_columns: str | None = None
    """Prefix of columns that hold `train` and `test` of one fold each (`fold_` in Patho-Bench); they become `fold`."""
    fold_files: tuple[str, ...] = ()
    """CSV files, one for each fold, whose column `test` lists keys, as CLAM writes them; they become `fold`."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Join:
        if self.table is None and not self.fold_files:
            raise ValueError("join needs `table` or `fold_files`")
        if self.fold_columns is not None and (self.table is None or self.fold_files):
            raise ValueError("join takes folds from `fold_columns` of its `table` or from `fold_files`, not from both")
        return self

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns that samples get."""
        return self._content[0]

    @functools.cached_property
    def digest(self) -> str:
        """Hash over everything that is joined."""
        return hashlib.sha256(json.dumps(self._content).encode()).hexdigest()

    def values(self, key: str | None) -> dict[str, str | None]:
        """Return the columns of one sample; nulls where the table does not have it."""
        return self._content[1].get(cell_text(key) or "") or dict.fromkeys(self.labels)

    @functools.cached_property
    def _content(self) -> tuple[tuple[str, ...], dict[str, dict[str, str | None]]]:
        columns: tuple[str, ...] = ()
        found: dict[str, dict[str, str | None]] = {}
        if self.table is not None:
            lines = _lines(Path(self.table))
            header = tuple(lines[0]) if lines else ()
            folds = [name for name in header if self.fold_columns and name.startswith(self.fold_columns)]
            columns = self._wanted(header, folds)
            for line in lines:
                values = {name: line[name] for name in columns} | self._fold_of(line, folds)
                self._add(found, line[self.key], values)
            columns += (FOLD,) if folds else ()
        if self.fold_files:
            self._add_fold_files(found, columns)
            columns += (FOLD,)
        return columns, found

    def _wanted(self, header: tuple[str, ...], folds: list[str]) -> tuple[str, ...]:
        """Return columns to take. Raises CorpusError if a column is not there, or has the name of one of the sample
        table's."""
        for name in (self.key, *(self.columns or ())):
            if name not in header:
                raise CorpusError(f"{self.table} has no column {name!r}; it has {', '.join(header[:20]) or 'no rows'}")
        if self.fold_columns and not folds:
            raise CorpusError(f"{self.table} has no column that begins with {self.fold_columns!r} (fold_columns)")
        wanted = self.columns or tuple(name for name in header if name != self.key and name not in folds)
        taken = [name for name in wanted if name in FIXED_COLUMNS.names]
        if taken:
            raise CorpusError(
                f"{self.table}: column {taken[0]!r} has the name of a column of the sample table; "
                "list the others as `columns` of the join, or rename it"
            )
        return wanted

    def _fold_of(self, line: dict[str, str | None], folds: list[str]) -> dict[str, str | None]:
        """In which fold a line is tested. Raises CorpusError if it is in none or several."""
        if not folds:
            return {}
        tested = [name for name in folds if (line[name] or "").strip().lower() == _TEST]
        if len(tested) != 1:
            raise CorpusError(
                f"{self.table}: {line[self.key]!r} is {_TEST!r} in {len(tested)} of the columns {', '.join(folds)}; "
                "expected one: a sample is tested once"
            )
        return {FOLD: tested[0].removeprefix(self.fold_columns or "")}

    def _add_fold_files(self, found: dict[str, dict[str, str | None]], columns: tuple[str, ...]) -> None:
        tested: dict[str, str] = {}
        for number, file in enumerate(self.fold_files):
            lines = _lines(Path(file))
            if not lines or _TEST not in lines[0]:
                raise CorpusError(f"{file} has no column {_TEST!r}; expected CLAM's columns train, val and test")
            for key in {key for line in lines if (key := cell_text(line[_TEST]))}:
                if key in tested:
                    raise CorpusError(
                        f"{file}: {key!r} is tested here and in fold {tested[key]} too; expected once "
                        "(splits drawn anew for each file are no cross-validation)"
                    )
                tested[key] = str(number)
        for values in found.values():
            values[FOLD] = None
        for key, fold in tested.items():
            found.setdefault(key, dict.fromkeys(columns))[FOLD] = fold

    def _add(self, found: dict[str, dict[str, str | None]], key: str | None, values: dict[str, str | None]) -> None:
        """Note a line. Several lines of one key (a patient's slides) must agree in the columns taken. Raises
        CorpusError if they do not."""
        key = cell_text(key)
        if key is None:
            raise CorpusError(f"{self.table}: a line has nothing in column {self.key!r}; every line needs its key")
        before = found.setdefault(key, values)
        for name, value in values.items():
            if cell_text(before[name]) != cell_text(value):
                raise CorpusError(
                    f"{self.table}: {key!r} has {name} {before[name]!r} on one line and {value!r} on another; "
                    f"take columns that are one per {self.key} (`columns`), or join on another key"
                )


def _lines(path: Path) -> list[dict[str, str | None]]:
    """Return lines of a table as labels by column. Raises CorpusError if it cannot be read, a line has too many or too
    few cells, or a column is listed twice."""
    try:
        if path.suffix.lower() == ".parquet":
            rows = shortest_floats(pq.read_table(path)).to_pylist()
            return [{name: as_label(value) for name, value in row.items()} for row in rows]
        return list(_separated(path))
    except OSError as error:
        raise CorpusError(f"table {path} cannot be read: {error.strerror or error}; check the path") from error
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"table {path} is neither CSV, TSV nor Parquet: {error}") from error


def _separated(path: Path) -> Iterator[dict[str, str | None]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise CorpusError(f"{path} names a column twice: {', '.join(header[:20])}")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise CorpusError(f"{path} line {reader.line_num} has {len(cells)} cells, expected {len(header)}")
            if cells:
                yield dict(zip(header, map(as_label, cells), strict=True))
