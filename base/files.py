"""Files that are written whole or not at all. A reader, a second writer or a kill at any moment sees the old file or
the new one, never a part: the bytes go to a temporary name beside the target, are flushed to disk, and are renamed onto
it. Behind a URL, an object is put in one request, which is as atomic."""

import contextlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TypeVar

try:
    import fcntl
except ImportError:  # Windows: only the age of a file shows that its writer is dead
    fcntl = None  # type: ignore[assignment]

from mmkd.base.errors import StoreError
from mmkd.base.places.remote import RemotePath, StorePath

TEMPORARY_SUFFIX = ".mmkd-tmp"

Place = TypeVar("Place", bound=StorePath)

# Some file systems keep locks per machine: only age shows that a writer elsewhere is dead.
_AGE_HERE, _AGE_ELSEWHERE = 1.0, 3600.0


@contextmanager
def disk_errors(path: StorePath) -> Iterator[None]:
    """Turn an OSError from writing `path` into a one-line StoreError."""
    try:
        yield
    except OSError as error:
        for place in (path, *path.parents) if isinstance(path, Path) else ():
            if place.is_symlink() and not place.exists():
                raise StoreError(
                    f"{place} is a link to {place.resolve()}, which does not exist; name a folder"
                ) from error
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; make room or get permission, then run it again"
        ) from error


def write_atomically(path: StorePath, data: bytes | memoryview, durable: bool = True) -> None:
    """Write `data` to `path` atomically, creating parent folders. `durable`: outlive a power cut. Raises StoreError,
    UnreachableError if it cannot be written; nothing is left behind."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    write_parts_atomically(path, (data,), durable)


def write_parts_atomically(path: StorePath, parts: Iterable[bytes | memoryview], durable: bool = True) -> None:
    """Write `parts` one after the other as `write_atomically` does; on a disk one of them is in memory at a time."""
    if isinstance(path, RemotePath):
        path.write_bytes(b"".join(parts))
        return
    target = regular_target(path)
    with _finished_beside(target, parts, durable) as temporary:
        temporary.replace(target)


def remove_file(path: StorePath) -> None:
    """Delete a file if it is there. Raises StoreError, UnreachableError if it cannot be deleted."""
    with disk_errors(path):
        path.unlink(missing_ok=True)


def create_atomically(path: StorePath, data: bytes | memoryview) -> bool:
    """Write `data` to `path` unless it exists: one of several concurrent writers wins. Returns False if a file existed.
    Raises StoreError, UnreachableError as `write_atomically`."""
    if isinstance(path, RemotePath):
        return path.create(data)
    path = regular_target(path)
    with _finished_beside(path, (data,)) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links (some FUSE and SMB mounts): the last one wins there.
            temporary.replace(path)
    return True


@contextmanager
def _finished_beside(path: Path, parts: Iterable[bytes | memoryview], durable: bool = True) -> Iterator[Path]:
    # A unique name per attempt: two processes may redo the same shard at once.
    writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{writer}{TEMPORARY_SUFFIX}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                _claim(file)
                file.writelines(parts)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def regular_target(path: Path) -> Path:
    """Return the file that `path` names, through a link; renaming onto a device or pipe would replace it by a regular
    file. Raises StoreError if something other than a regular file is there, or a link to nothing."""
    with disk_errors(path):
        target = path.resolve() if path.is_symlink() else path
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            if path.is_symlink():
                raise StoreError(f"{path} is a link to {target}, which does not exist; name a regular file") from None
            return target
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise StoreError(f"cannot write {path}: it is {what}, not a regular file; name another file")
    return target


def _claim(file: IO[bytes]) -> bool:
    """Lock a file while it is open here. The system releases the lock when the process dies."""
    with contextlib.suppress(OSError):  # locked by another process, or a file system without locks
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def remove_abandoned(root: StorePath) -> int:
    """Delete the temporary files of dead writers below `root`, never those of live ones, and return their number."""
    here = re.compile(rf"\.{re.escape(socket.gethostname())}-\d+-[0-9a-f]+{re.escape(TEMPORARY_SUFFIX)}$")
    removed = 0
    for path in temporary_files(root):
        if isinstance(path, RemotePath):
            continue
        # Gone by now where its writer finished; a folder, or not ours to open, where it is another's.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError), path.open("r+b") as file:
            age = time.time() - os.fstat(file.fileno()).st_mtime
            if age > (_AGE_HERE if here.search(path.name) else _AGE_ELSEWHERE) and _claim(file):
                remove_file(path)
                removed += 1
    return removed


def list_folder(folder: Place, pattern: str = "*") -> list[Place]:
    """Return files and folders directly below `folder` whose name matches `pattern`, sorted; none if it does not exist.
    `Path.glob` also returns nothing for a folder that cannot be read; here only "not found" means empty. Raises
    StoreError, UnreachableError if the folder exists and cannot be listed."""
    if isinstance(folder, RemotePath):
        return sorted(folder.glob(pattern), key=str)  # type: ignore[arg-type]
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(error, folder) from error
    return [folder / name for name in sorted(names) if fnmatchcase(name, pattern)]


def walk_files(folder: StorePath, pattern: str = "*") -> Iterator[StorePath]:
    """Yield files at any depth below `folder` whose name matches `pattern`, sorted by folder; none if it does not
    exist. Raises StoreError, UnreachableError as `list_folder`."""
    if isinstance(folder, RemotePath):
        yield from folder.rglob(pattern)
        return

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise _unreadable(error, folder) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        yield from (Path(parent) / name for name in sorted(names) if fnmatchcase(name, pattern))


def _unreadable(error: OSError, folder: Path) -> StoreError:
    return StoreError(f"cannot list {error.filename or folder}: {error.strerror}; get permission, then run it again")


def temporary_files(root: StorePath) -> Iterator[StorePath]:
    """Yield files below `root` that an interrupted `write_atomically` left behind."""
    yield from walk_files(root, f".*{TEMPORARY_SUFFIX}")
