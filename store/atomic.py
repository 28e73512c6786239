"""Files that are there wholly or not at all.

A reader, a second writer or a kill at any moment sees the old file or the new one, never a part:
the bytes go to a temporary name beside the target, are flushed to disk, and are renamed onto it. Behind a
URL, an object is put in one request, which is as atomic.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmkd.store.errors import StoreError
from mmkd.store.remote import RemotePath, StorePath

TEMPORARY_SUFFIX = ".mmkd-tmp"


@contextmanager
def disk_errors(path: StorePath) -> Iterator[None]:
    """Turn an OSError met while writing `path` into one line that says what to do.

    Raises:
        StoreError: the disk is full, read-only, or not ours to write.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; make room or get permission, then run it again"
        ) from error


def write_atomically(path: StorePath, data: bytes | memoryview) -> None:
    """Put `data` at `path` in one step, creating parent folders.

    Raises:
        StoreError: the disk is full, read-only, or not ours to write; nothing is left behind.
        UnreachableError: the same of a URL.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    with _finished_beside(path, data) as temporary:
        temporary.replace(path)


def create_atomically(path: StorePath, data: bytes | memoryview) -> bool:
    """Put `data` at `path` if nothing is there; of several that try at once, one wins.

    Returns:
        False when a file was there; it is left as it is.

    Raises:
        StoreError, UnreachableError: as `write_atomically`.
    """
    if isinstance(path, RemotePath):
        return path.create(data)
    with _finished_beside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links (some FUSE and SMB mounts): the last one wins there.
            temporary.replace(path)
    return True


@contextmanager
def _finished_beside(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    # A name of its own for every attempt: two processes may redo the same shard at the same time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def temporary_files(root: StorePath) -> Iterator[StorePath]:
    """Files below `root` that an interrupted `write_atomically` left behind."""
    yield from root.rglob(f".*{TEMPORARY_SUFFIX}")
