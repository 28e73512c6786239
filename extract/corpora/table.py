"""Corpora listed in a CSV, TSV or JSONL file, with images in a folder beside it."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mmkd.extract.corpora.row import CorpusRow
from mmkd.store.errors import CorpusError
from mmkd.store.samples import FIXED_COLUMNS
from mmkd.store.yaml_config import Frozen

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")

# Names that released biomedical corpora use, in the order in which they are tried.
_USUAL = {
    "image": ("image", "filepath", "image_path", "imgpath", "path", "file", "filename"),
    "caption": ("caption", "text", "txt", "title"),
    "key": ("key", "id", "uid", "sample_id"),
    "modality": ("modality",),
}
# A caption is a paragraph at most; what is longer is a parsing accident, and csv's default stops at 131072.
_MAX_FIELD = 2**20


class TableColumns(Frozen):
    """Which column is what. A column that is not named is looked for under its usual names."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    modality: str | None = None


class TableCorpus(Frozen):
    """A table of image paths and captions. As YAML, this is the content of `corpus.yaml`."""

    kind: Literal["table"] = "table"
    path: Path
    images: Path | None = None
    """Folder that image paths are relative to; the table's own folder when not given."""
    columns: TableColumns = TableColumns()
    label_columns: tuple[str, ...] | None = None
    """Columns that pass into the sample table; all others when not given."""

    @property
    def location(self) -> str:
        """The table's path."""
        return str(self.path)

    @property
    def root(self) -> Path:
        """The image folder, absolute."""
        return (self.images or self.path.parent).resolve()

    @property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in the table's order."""
        roles = self._roles()
        return self._labels(roles, self._header())

    def digest(self) -> str:
        """SHA-256 over the table's bytes and how its columns are read."""
        with self.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        content.update(self.model_dump_json(include={"columns", "label_columns"}).encode())
        return content.hexdigest()

    def rows(self) -> Iterator[CorpusRow]:
        """One row per line of the table.

        Raises:
            CorpusError: a named column is not there, or a line cannot be parsed.
        """
        roles = self._roles()
        labels = self._labels(roles, self._header())
        for number, record in enumerate(self._records()):
            image = record.get(roles["image"], "") if "image" in roles else ""
            caption = record.get(roles["caption"], "") if "caption" in roles else None
            key = record.get(roles["key"], "") if "key" in roles else image
            yield CorpusRow(
                key=key or f"line-{number + 1}",
                caption=None if caption is None else _decodable(caption),
                uri=image or None,
                modality=record.get(roles["modality"]) or None if "modality" in roles else None,
                labels={label: _decodable(record.get(label, "")) for label in labels},
            )

    def _roles(self) -> dict[str, str]:
        header = self._header()
        roles: dict[str, str] = {}
        for role, usual in _USUAL.items():
            named = getattr(self.columns, role)
            if named is not None and named not in header:
                raise CorpusError(f"{self.path} has no column {named!r} (for the {role}); it has {', '.join(header)}")
            found = named or next((name for name in usual if name in header), None)
            if found is not None:
                roles[role] = found
        if not {"image", "caption"} & set(roles):
            raise CorpusError(
                f"{self.path} has no column for the image or the caption; it has {', '.join(header)}; "
                "name them in a corpus.yaml: {kind: table, path: ..., columns: {image: ..., caption: ...}}"
            )
        return roles

    def _labels(self, roles: Mapping[str, str], header: list[str]) -> tuple[str, ...]:
        wanted = self.label_columns
        if wanted is None:
            wanted = tuple(name for name in header if name not in roles.values())
        for label in wanted:
            if label not in header:
                raise CorpusError(f"{self.path} has no label column {label!r}; it has {', '.join(header)}")
            if label in FIXED_COLUMNS.names:
                raise CorpusError(
                    f"{self.path}: label column {label!r} has the name of a column of the sample table; "
                    f"rename it (taken: {', '.join(FIXED_COLUMNS.names)})"
                )
        return wanted

    def _header(self) -> list[str]:
        first = next(self._records(), None)
        if first is None:
            raise CorpusError(f"{self.path} has no rows; expected a header and one line per image-text pair")
        return list(first)

    def _records(self) -> Iterator[dict[str, str]]:
        # Bytes that are not UTF-8 must not cost the lines around them: they survive as surrogates.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if self.path.suffix == ".jsonl":
                yield from _json_lines(self.path, file)
                return
            csv.field_size_limit(_MAX_FIELD)
            reader = csv.DictReader(file, delimiter="\t" if self.path.suffix == ".tsv" else ",", restval="")
            try:
                for record in reader:
                    record.pop(None, None)  # cells beyond the header
                    yield record
            except csv.Error as error:
                raise CorpusError(
                    f"{self.path} line {reader.line_num}: {error}; is it a {self.path.suffix} file?"
                ) from error


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[dict[str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{path} line {number} holds {type(record).__name__}, expected an object per line")
        yield {name: _as_text(value) for name, value in record.items()}


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _decodable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if not text.isascii() else text
