"""A bounded folder of what was fetched from a store behind a URL, shared by all processes of a machine: each file is
fetched once, whole, and the ones that were asked for longest ago go first. Other files in it are left alone."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two processes may fetch a file at the same time
    fcntl = None  # type: ignore[assignment]

from mmkd.base.errors import StoreError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors, remove_file, write_atomically

_LOCK, _ACCOUNT = ".lock", ".bytes"
_OWN = re.compile(rf"\.?[0-9a-f]{{12}}-.+-\d{{5,}}-[0-9a-f]{{8}}(\..+{TEMPORARY_SUFFIX})?")
"""Names that `fetch` gives: store, array, shard, checksum; and those that a killed process left of one. A user may name
a folder that has other files."""


@dataclass
class Cache:
    """The folder, the most bytes that its files may have, and the beginning of the names of one store's. kept: files of
    one array that a process holds open, read when the first one is."""

    folder: Path
    limit: int
    store: str
    kept: int = 1
    owner: int = field(default_factory=os.getpid)
    """The process that may fetch: threads of the network do not live on in one that is forked from it."""

    def fetch(self, name: str, size: int, read: Callable[[], bytes]) -> Path:
        """Return the file `name` of `size` bytes, written from `read` when it is not there. Raises StoreError if the
        disk is full; and what `read` raises."""
        path = self.folder / f"{self.store}-{name}"
        if not _touched(path):
            with self._locked(f"{path.name}{_LOCK}"):
                if not _touched(path):
                    if os.getpid() != self.owner:
                        raise StoreError(f"{path} was taken away while it was needed; give the cache more room")
                    data = read()
                    with self._locked(_LOCK):
                        self._make_room(size)
                        write_atomically(path, data, durable=False)  # its checksum is looked at when it is read
        return path

    @property
    def room(self) -> int:
        """Most bytes that stay when files have to go: a little less than the limit, so that the folder is not listed
        again for the next file."""
        return self.limit - self.limit // 32

    def _make_room(self, size: int) -> None:
        """Count `size` more bytes; if they do not fit, delete the files that were asked for longest ago until they do.
        The count is kept in a file. After a kill, or if a user deletes files, it is too high, and corrected when it
        reaches the limit."""
        if size > self.room:
            raise StoreError(f"{self.folder}: a file of {size:,} bytes is over the limit of {self.room:,}; raise it")
        account = self.folder / _ACCOUNT
        with disk_errors(account):
            held = None
            with suppress(FileNotFoundError, ValueError):
                held = int(account.read_bytes())
            if held is None or held + size > self.limit:
                held = self._shrink(size)
            account.write_bytes(b"%d" % (held + size))

    def _shrink(self, size: int) -> int:
        """Delete files if `size` bytes do not fit; return the bytes of those that stay."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in filter(lambda entry: _OWN.fullmatch(entry.name), entries):
                with suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        held = sum(bytes_of for _, bytes_of, _ in found)
        if held + size <= self.limit:
            return held
        for _, bytes_of, path in sorted(found):
            if held + size <= self.room:
                break
            remove_file(path)
            remove_file(path.with_name(f"{path.name}{_LOCK}"))
            held -= bytes_of
        return held

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / name).open("wb")
        with file, ExitStack() as undo:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Closing is not enough: a data worker that was forked meanwhile has the file open too.
                undo.callback(fcntl.flock, file, fcntl.LOCK_UN)
            yield


def _touched(path: Path) -> bool:
    """Note that a file is asked for; return False if it is not there. Raises StoreError if it cannot be noted."""
    with disk_errors(path), suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(),) * 2)
        return True
    return False
