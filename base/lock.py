"""One writer of a store at a time: a second one learns who holds the lock, and stops before it has done anything.

On a disk the lock is `flock(2)` on a file inside the store: the kernel releases it when its holder exits for any
reason. Behind a URL it is an object that its holder writes again every few seconds; a stale one belongs to a killed
writer and is taken over. Reading needs no lock: files are replaced whole.
"""

import errno
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

from mmkd.base.errors import BusyStoreError, UnreachableError
from mmkd.base.files import disk_errors
from mmkd.base.places.remote import RemotePath, StorePath
from mmkd.base.process import repeated

LOCK_FILE = ".mmkd-lock"
BEAT_SECONDS = 5.0
"""Seconds between rewrites of the lock object behind a URL."""
PATIENCE_BEATS = 4
"""Unchanged beats after which the lock object counts as abandoned."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""A file system without locks (Lustre mounted without `flock`, some FUSE)."""
_ATTEMPTS = 1000
"""Other writers may take folder or file away this often; a path that can never be made must not be tried forever."""


@contextmanager
def only_writer(root: StorePath, what: str) -> Iterator[None]:
    """Hold the store at `root` for writing. Raises BusyStoreError if another process writes to it; StoreError,
    UnreachableError if the lock cannot be written. `root`: the store, or the folder that will be one; a folder is made
    if it is not there. `what`: what is being done, as a second writer reads it: `mmkd store append`."""
    note = {"what": what, "process": os.getpid(), "host": socket.gethostname()}
    note["since"] = datetime.now(UTC).isoformat(timespec="seconds")
    with _beating(root, note) if isinstance(root, RemotePath) else _locked(root, note):
        yield


def lock_until_closed(file: IO[bytes], waiting: Callable[[], None] | None = None) -> None:
    """Wait until no other process has this open file locked, then lock it; closing the file ends that. `waiting` is
    called once if another process has the lock."""
    if fcntl is not None and not _try_lock(file.fileno()):
        if waiting is not None:
            waiting()
        fcntl.flock(file, fcntl.LOCK_EX)


def _try_lock(fd: int) -> bool:
    """Lock an open file without waiting; False if another process has it locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _busy(root: StorePath, data: bytes) -> BusyStoreError:
    try:
        note = json.loads(data)
        who = f"`{note['what']}` (process {note['process']} on {note['host']}, since {note['since']})"
    except (ValueError, KeyError, TypeError):
        who = "another process"  # it has the lock and has not written its name yet
    return BusyStoreError(f"{root} is being written by {who}; wait until it has ended, then run this again")


@contextmanager
def _locked(root: Path, note: dict[str, object]) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    path, made = root / LOCK_FILE, not root.exists()
    fd = _open_locked(path)
    _held.add(fd)
    try:
        with disk_errors(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(note).encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                if made:
                    root.rmdir()  # nothing was written; a folder with a store stays
    finally:
        if fd in _held:
            _held.remove(fd)
            os.close(fd)


def _open_locked(path: Path) -> int:
    """Return the lock file, opened and locked; its folder is made if it is not there."""
    for _ in range(_ATTEMPTS):
        # Another writer that came to nothing may take its folder away at any moment: while `mkdir` looks whether it is
        # one, or before the file is made. What is there and no folder is refused by `open`.
        with disk_errors(path), suppress(FileNotFoundError):
            with suppress(FileExistsError):
                path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with ExitStack() as stack:
                stack.callback(os.close, fd)
                if not _try_lock(fd):
                    raise _busy(path.parent, os.pread(fd, 4096, 0))
                # The previous holder deletes its file: a lock on a deleted file does not count.
                if path.stat().st_ino == os.fstat(fd).st_ino:
                    stack.pop_all()
                    return fd
    with disk_errors(path):
        raise FileNotFoundError(errno.ENOENT, "its folder cannot be made, or is taken away again and again")


_held: set[int] = set()
"""Descriptors of locks. A child that is forked closes its copies: it would hold the lock after a killed parent."""


def _close_held() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


@contextmanager
def _beating(root: RemotePath, note: dict[str, object]) -> Iterator[None]:
    path = root / LOCK_FILE
    mine = note | {"token": secrets.token_hex(8)}
    _take(root, path, json.dumps(mine | {"beat": 0}).encode())
    numbers = itertools.count(1)

    def beat() -> None:
        # A failed beat is retried with the next; only several in a row look like a dead writer.
        with suppress(UnreachableError):
            path.write_bytes(json.dumps(mine | {"beat": next(numbers)}).encode())

    try:
        with repeated(beat, BEAT_SECONDS, "mmkd-lock"):
            yield
    finally:
        with suppress(UnreachableError, FileNotFoundError):
            path.unlink(missing_ok=True)


def _take(root: RemotePath, path: RemotePath, data: bytes) -> None:
    """Create the object, or replace an abandoned one."""
    if path.create(data):
        return
    try:
        first = path.tagged()
    except FileNotFoundError:
        first = (b"", None)
    deadline = time.monotonic() + PATIENCE_BEATS * BEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        try:
            now = path.tagged()
        except FileNotFoundError:
            if path.create(data):  # its holder has ended
                return
            continue
        if now[0] != first[0] and first[0]:
            raise _busy(root, now[0])
        first = now
    if not path.replace_tagged(data, first[1]):
        raise _busy(root, path.read_bytes())  # another one took it over first
