"""The root group's attributes: what the store is, of which corpus, and since when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmkd.store.errors import CorruptStoreError, FormatVersionError, NotAStoreError
from mmkd.store.layout import FORMAT_VERSION


class CorpusRecord(BaseModel):
    """The corpus that the rows come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """Reader that made the index, for example `table` or `webdataset`."""
    location: str
    """What the user named."""
    root: str
    """Absolute folder that the sample rows' `uri` is relative to."""
    rows: int = Field(ge=0)
    labels: tuple[str, ...] = ()
    """Label columns beyond the fixed ones."""
    digest: str
    """SHA-256 over names, sizes and change times of the corpus' index files: notices a changed corpus."""


class StoreRecord(BaseModel):
    """`attributes["mmkd"]` of the root group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    rows: int = Field(ge=0)
    """Grid rows N: the first axis of every array."""
    rows_per_shard: int = Field(gt=0)
    corpus: CorpusRecord
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CorruptStoreError: it is not one.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptStoreError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptStoreError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content


def read_record(root: Path) -> StoreRecord:
    """Read what the store says of itself.

    Raises:
        NotAStoreError: nothing here, or a Zarr hierarchy of someone else.
        FormatVersionError: written by a newer mmkd.
        CorruptStoreError: the metadata cannot be understood.
    """
    path = root / "zarr.json"
    if not path.is_file():
        what = "does not exist" if not root.exists() else "holds no zarr.json"
        raise NotAStoreError(f"{root} is not an mmkd store: it {what}; `mmkd extract CORPUS {root}` makes one")
    attributes = read_json(path).get("attributes", {}).get("mmkd")
    if not isinstance(attributes, dict):
        raise NotAStoreError(f"{root} is a Zarr hierarchy, but its attributes hold no 'mmkd': it was not made by mmkd")
    version = attributes.get("format")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{root} is of format {version!r}, this mmkd reads format {FORMAT_VERSION}; install a newer mmkd"
        )
    try:
        return StoreRecord.model_validate(attributes)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptStoreError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
