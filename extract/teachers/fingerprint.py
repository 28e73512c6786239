"""SHA-256 of files and of settings. A file is hashed once: the result is remembered by path, size, time and inode."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmkd.base.errors import StoreError, TeacherError
from mmkd.base.files import write_atomically


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
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(entry.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("file") == identity:
                return str(content["sha256"])
        with path.open("rb") as file:
            file.seek(skip)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TeacherError(f"cannot read {path}: {error.strerror or error}") from error
    with contextlib.suppress(StoreError):  # a read-only home costs time at the next start, nothing else
        write_atomically(entry, json.dumps({"file": identity, "sha256": digest}).encode())
    return digest


def settings_sha256(settings: Mapping[str, object] | Sequence[object]) -> str:
    """Return the hex SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
