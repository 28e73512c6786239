"""SHA-256 of files and of settings. A file is hashed once: the result is remembered by path, size, time and inode."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmkd.base.errors import StoreError, TeacherError
from mmkd.base.files import write_atomically

_BLOCK = 1 << 20


def cache_directory() -> Path:
    """Hash cache folder: `$XDG_CACHE_HOME/mmkd/sha256`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmkd" / "sha256"


def file_sha256(path: Path, skip: int = 0) -> str:
    """Hex SHA-256 of a file's bytes from offset `skip` on, from the cache where the file has not changed. Raises
    TeacherError if the file cannot be read."""
    try:
        status = path.stat()
        identity = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, skip]
        entry = cache_directory() / f"{settings_sha256(identity)}.json"
        remembered = _read_entry(entry, identity)
        if remembered is not None:
            return remembered
        with path.open("rb") as file:
            file.seek(skip)
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise TeacherError(f"cannot read {path}: {error.strerror or error}") from error
    _write_entry(entry, {"file": identity, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def settings_sha256(settings: Mapping[str, object] | Sequence[object]) -> str:
    """Return the hex SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_entry(entry: Path, identity: list[object]) -> str | None:
    try:
        content = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("file") != identity:
        return None
    return str(content["sha256"])


def _write_entry(entry: Path, content: dict[str, object]) -> None:
    try:
        write_atomically(entry, json.dumps(content).encode())
    except StoreError:
        # A read-only home costs time at the next start, nothing else.
        return
