"""Zarr v3 `zarr.json` files of a store, written whole and checked when read. Array documents follow from the record and
the card. What only the store knows is in `attributes.mmkd` with a seal, the SHA-256 of its own canonical JSON: a
changed byte that still parses breaks the seal."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mmkd.base.errors import CorruptStoreError, NotAStoreError, StoreError, faults_as
from mmkd.base.files import list_folder, write_atomically
from mmkd.base.places.remote import RemotePath, StorePath

MAX_DOCUMENT_BYTES = 1 << 24
"""A metadata file larger than 16 MiB is refused unread: ours are a few kilobytes."""

SEAL = "sha256"
"""Member of `attributes.mmkd` that holds the seal."""


class Document(BaseModel):
    """Base of what a store keeps as JSON: frozen, and an unknown member is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


DocumentType = TypeVar("DocumentType", bound=BaseModel)


def parse_document(model: type[DocumentType], content: dict[str, Any] | bytes, path: StorePath) -> DocumentType:
    """Validate a parsed document, or JSON. Raises CorruptStoreError with the first fault, its member, and `path`."""
    try:
        return model.model_validate_json(content) if isinstance(content, bytes) else model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or model.__name__
        raise CorruptStoreError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from error


def canonical_sha256(content: object) -> str:
    """Return the SHA-256 in hex over canonical JSON: sorted, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 in hex over the canonical JSON of `content` without its seal."""
    return canonical_sha256({name: value for name, value in content.items() if name != SEAL})


def group_document(content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a Zarr group; `content` becomes `attributes.mmkd`, sealed."""
    attributes = {} if content is None else {"mmkd": content | {SEAL: seal_of(content)}}
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def array_document(
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    data_type: str,
    *,
    inner: tuple[int, ...] | None = None,
    axis: str = "feature",
) -> dict[str, Any]:
    """Return a Zarr array of uncompressed little-endian chunks; missing floats are NaN, missing bits 0. `inner`: shape
    of the chunks that each `chunk` is a pack of (Zarr's sharding codec); without it a chunk ends with its CRC32C.
    `axis`: name of the second dimension, if there is one; the first is `row`."""
    one_byte = data_type in ("int8", "uint8")
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    serializer = {"name": "bytes"} if one_byte else little
    pack = {
        "chunk_shape": list(inner or ()),
        "codecs": [serializer],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": pack}] if inner else [serializer, {"name": "crc32c"}]
    return {
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0 if one_byte else "NaN",
        "codecs": codecs,
        "dimension_names": ["row", axis][: len(shape)],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def encode_document(document: dict[str, Any]) -> bytes:
    """Return the bytes of a `zarr.json`: two spaces of indent, as zarr-python writes it."""
    return json.dumps(document, indent=2).encode()


def write_document(path: StorePath, document: dict[str, Any]) -> None:
    write_atomically(path, encode_document(document))


def is_there(path: StorePath) -> bool:
    """Return False only if nothing is at `path`. A folder, a dangling link or an unreadable file counts as present,
    unlike with `Path.is_file`. Raises StoreError if a folder above it may not be searched."""
    if isinstance(path, RemotePath):
        return path.is_file()
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StoreError(f"cannot look for {path}: {error.strerror}; get permission, then run it again") from error
    return True


def read_file(path: StorePath, most: int | None = None) -> bytes:
    """Return the bytes of a regular file of at most `most` bytes. Raises CorruptStoreError if it cannot be read, is
    larger, or is something other than a regular file (a pipe would block)."""
    with faults_as(CorruptStoreError, OSError, f"{path} cannot be read", "; get permission, or a copy of it"):
        size = path.stat().st_size
        if isinstance(path, Path) and not path.is_file():
            what = "a folder" if path.is_dir() else "a device, pipe or socket"
            raise CorruptStoreError(f"{path} is {what}, expected a file; put the file back from a copy")
        if most is not None and size > most:
            raise CorruptStoreError(f"{path} has {size} bytes, expected at most {most}")
        return path.read_bytes()


def read_range(path: StorePath, start: int, length: int) -> bytes:
    """Return at most `length` bytes of a file from `start` on. Raises OSError."""
    if isinstance(path, RemotePath):
        return path.read_range(start, length)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def list_part(root: StorePath, folder: str, pattern: str = "*") -> Sequence[StorePath]:
    """Return files and folders directly below `root/folder`, sorted. Raises NotAStoreError if there is no store at
    `root` any more; StoreError, UnreachableError if the folder cannot be listed."""
    found = list_folder(root / folder, pattern)
    if not found and not is_there(root / "zarr.json"):
        raise NotAStoreError(f"{root} is not there any more; was it moved or deleted?")
    return found


def read_json(path: StorePath) -> dict[str, Any]:
    """Parse a JSON object. Raises CorruptStoreError if it cannot be read, is none, or names a member twice."""
    with faults_as(CorruptStoreError, (ValueError, RecursionError), f"{path} is not JSON"):
        content = json.loads(read_file(path, MAX_DOCUMENT_BYTES), object_pairs_hook=_distinct_members)
    if not isinstance(content, dict):
        raise CorruptStoreError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content


def _distinct_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a member is named twice")
    return content


def encode_sealed(document: Document) -> bytes:
    """Return the bytes of a JSON file with its own seal."""
    content = document.model_dump(mode="json")
    return (json.dumps(content | {SEAL: seal_of(content)}, indent=1) + "\n").encode()


def read_sealed(model: type[DocumentType], path: StorePath, advice: str = "") -> DocumentType:
    """Read a file of `encode_sealed`. Raises CorruptStoreError, which ends in `advice`, if it was changed since."""
    content = read_json(path)
    if content.pop(SEAL, None) != seal_of(content):
        raise CorruptStoreError(f"{path} was changed after it was written{advice}")
    return parse_document(model, content, path)


def document_fault(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Return members in which a document is not the one that follows from the record and the card, or None.
    `attributes` may hold entries of other tools; they do not change how the bytes are read."""
    if isinstance(found.get("attributes", {}), dict):
        found = found | {"attributes": expected["attributes"]}
    found = {"storage_transformers": expected.get("storage_transformers")} | found
    return ", ".join(sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))) or None


def own_attributes(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the `attributes.mmkd` of a document, with its seal; None if it has none."""
    attributes = document.get("attributes")
    content = attributes.get("mmkd") if isinstance(attributes, dict) else None
    return content if isinstance(content, dict) else None


def sealed_content(path: StorePath, document: dict[str, Any]) -> dict[str, Any]:
    """Return the `attributes.mmkd` of a group without its seal; other tools may add attributes. Raises
    CorruptStoreError if it is not a Zarr v3 group, has no `mmkd`, or its seal is broken."""
    content = own_attributes(document)
    if content is None:
        raise CorruptStoreError(f"{path} holds no attributes 'mmkd'; put the file back from a copy")
    if content.get(SEAL) != (seal := seal_of(content)):
        raise CorruptStoreError(
            f"{path} was changed after it was written: its attributes have SHA-256 {seal[:16]}..., "
            f"{str(content.get(SEAL))[:16]}... was written with them; put the file back from a copy"
        )
    rest = {name: value for name, value in document.items() if name not in ("attributes", "consolidated_metadata")}
    if rest != {"zarr_format": 3, "node_type": "group"}:
        raise CorruptStoreError(f"{path}: not the metadata of a Zarr v3 group: {json.dumps(rest)[:120]}")
    return {name: value for name, value in content.items() if name != SEAL}
