"""Reading files that a user named, on a disk or behind a URL, by one set of functions."""

import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmkd.base.places.remote import RemotePath, StorePath, as_root, in_parallel

_READ_AHEAD = 1 << 20


@dataclass(frozen=True)
class Listed:
    """A file and the properties that show whether it has changed."""

    name: str
    """Relative to the folder, with `/` between its parts."""
    size: int
    """Bytes."""
    stamp: str
    """Changes with the file: time of modification in ns, or the server's ETag or time of modification."""


def join(folder: StorePath, name: str) -> StorePath:
    """Return the file `name` seen from `folder`; absolute paths and URLs are returned unchanged."""
    if "://" in name:
        return as_root(name)
    return folder / name if isinstance(folder, RemotePath) else Path(os.path.normpath(folder / name))


def open_file(place: StorePath) -> IO[bytes]:
    """Open a regular file for reading, with random access. Raises OSError if it is missing, not readable, or not a
    regular file (a pipe would block forever); UnreachableError if the server refuses or fails."""
    if isinstance(place, RemotePath):
        return io.BufferedReader(_RemoteFile(place), _READ_AHEAD)
    # O_NONBLOCK: opening a pipe without a writer would block. It has no effect on regular files.
    file = open(place, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "not an ordinary file")
    return file


def read_range(place: StorePath, offset: int, length: int) -> bytes:
    """Return at most `length` bytes from `offset` on. Raises OSError, UnreachableError as `open_file`."""
    if isinstance(place, RemotePath):
        return place.read_range(offset, length)
    with open_file(place) as file:
        file.seek(offset)
        return file.read(length)


def stat_file(place: StorePath) -> Listed:
    """Return name, size and stamp of a file. Raises OSError, UnreachableError as `open_file`."""
    found = place.stat()
    stamp = str(found.st_mtime_ns) if isinstance(found, os.stat_result) else found.stamp
    return Listed(place.name, found.st_size, stamp)


def list_files(folder: StorePath) -> Iterator[Listed]:
    """Yield all files below a folder, sorted by name; hidden ones are left out, links to folders are followed once. A
    link to a file that does not exist (of git-annex before `get`) is listed as an empty file. Raises OSError,
    UnreachableError if it cannot be listed."""
    if isinstance(folder, Path):
        yield from sorted(_walk(folder), key=lambda listed: listed.name)
        return
    paths = {str(path.key.relative_to(folder.key)): path for path in folder.rglob("*")}
    names = sorted(name for name in paths if not any(part.startswith(".") for part in name.split("/")))
    for name, found in zip(names, in_parallel(RemotePath.stat, [paths[name] for name in names], folder), strict=True):
        yield Listed(name, found.st_size, found.stamp)


class _RemoteFile(io.RawIOBase):
    """An object as a file: each read is one request for a range of bytes."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.size, self.position = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.path.read_range(self.position, min(len(view), self.size - self.position))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def _walk(root: Path) -> Iterator[Listed]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(folder).relative_to(root)
        for name in files:
            if not name.startswith("."):
                path = Path(folder) / name
                if path.is_file():
                    found = path.stat()
                    yield Listed((prefix / name).as_posix(), found.st_size, str(found.st_mtime_ns))
                elif path.is_symlink() and not path.exists():
                    yield Listed((prefix / name).as_posix(), 0, "")
