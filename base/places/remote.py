"""Files and folders behind URLs, with the methods of `pathlib.Path` that stores and corpora use.

All code takes a root and adds names with `/`; `as_root` alone decides whether bytes lie on a disk or behind
`s3://`. Requests go through obstore, which is also what zarr's `ObjectStore` uses; it takes credentials and
endpoints from the environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`).
"""

import errno
import importlib.util
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from mmkd.base.errors import UnreachableError, UserError
from mmkd.base.install import install_command
from mmkd.base.places.connection import answered, linked_names, server

REQUESTS = 16
"""Requests that are under way at the same time."""

_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https", "memory")
_WHOLE = 1 << 28
"""Bytes. A longer range is cut to the object's size first."""


class Stat(NamedTuple):
    """Properties of an object that are known before it is read."""

    st_size: int
    """Bytes."""
    stamp: str
    """Changes with the object: its ETag, or else its time of modification."""

    @classmethod
    def of(cls, found: Any) -> "Stat":
        """Build from results of obstore's `head` and `list`."""
        return cls(found["size"], str(found["e_tag"] or found["last_modified"] or ""))


@dataclass(frozen=True, order=True)
class RemotePath:
    """An object, or the folder of those whose names begin with it. Holds no connection, so it can be sent to workers.
    Methods do what those of `pathlib.Path` do, and raise FileNotFoundError as they do. Raises UnreachableError from
    every method that asks the server: no permission, no bucket, no answer."""

    origin: str
    """Scheme and bucket or host: `s3://bucket`."""
    key: PurePosixPath
    """Name inside the bucket."""
    known: Stat | None = field(default=None, compare=False)
    """Properties, when the path comes from a listing."""

    def __truediv__(self, name: str | PurePosixPath) -> "RemotePath":
        return RemotePath(self.origin, self.key / name)

    def __str__(self) -> str:
        return f"{self.origin}/{self._name}".rstrip("/")

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def suffix(self) -> str:
        """Suffix of the last part, with its dot; a query such as a signature does not count."""
        return PurePosixPath(self.name.partition("?")[0]).suffix

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.origin, self.key.parent)

    @property
    def _name(self) -> str:
        return "" if self.key == PurePosixPath() else str(self.key)

    @property
    def is_web(self) -> bool:
        """True behind plain HTTP, where folders are listed by pages if at all."""
        return self.origin.startswith("http")

    def resolve(self) -> "RemotePath":
        return self  # URLs are absolute

    def stat(self) -> Stat:
        """Return size and stamp, from the listing that this path came from or from the server."""
        if self.known is not None:
            return self.known
        with answered(str(self)):
            return Stat.of(server(self.origin).head(self._name))

    def is_file(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Return True when an object's name begins with this folder, and none has this very name."""
        return not self.is_file() and any(True for _ in self.iterdir())

    def exists(self) -> bool:
        return self.is_file() or any(True for _ in self.iterdir())

    def read_bytes(self) -> bytes:
        with answered(str(self)):
            data: bytes = server(self.origin, reading=True).get(self._name).bytes().to_bytes()
        return data

    def read_range(self, offset: int, length: int) -> bytes:
        """Return at most `length` bytes from `offset` on."""
        if length > _WHOLE:
            length = min(length, self.stat().st_size - offset)
        if length <= 0:  # servers answer an empty range with an error
            return b""
        with answered(str(self)):
            store = server(self.origin, reading=True)
            data: bytes = store.get_range(self._name, start=offset, length=length).to_bytes()
        return data

    def tagged(self) -> tuple[bytes, str | None]:
        """Return all bytes of the object, and the server's tag of this version."""
        with answered(str(self)):
            found = server(self.origin).get(self._name)
            return found.bytes().to_bytes(), found.meta["e_tag"]

    def replace_tagged(self, data: bytes, tag: str | None) -> bool:
        """Put the object if it is still the version of `tag` (`If-Match`); False when it is not."""
        return self._put(data, "overwrite" if tag is None else {"e_tag": tag})

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Put the whole object in one request: others see the old one or the new one."""
        self._put(data, "overwrite")

    def create(self, data: bytes | memoryview) -> bool:
        """Put the object if there is none (`If-None-Match: *`); False when there was one."""
        return self._put(data, "create")

    def _put(self, data: bytes | memoryview, mode: Any) -> bool:
        """Put the object; False when the server has another version than `mode` asks for."""
        try:
            with answered(str(self)):
                # In one part: an upload of several parts that is killed leaves parts behind that nobody lists.
                server(self.origin).put(self._name, data, mode=mode, use_multipart=False)
            return True
        except FileExistsError:
            if mode == "overwrite":
                raise
            return False
        except FileNotFoundError as error:
            raise UnreachableError(f"{self} cannot be written: {self.origin} is not there; check its name") from error

    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok or self.is_file():
            with answered(str(self)):
                server(self.origin).delete(self._name)
        else:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))

    def iterdir(self) -> Iterator["RemotePath"]:
        """Yield objects and folders right below; nothing for a folder that is not there."""
        if self.is_web:
            yield from (self / name for name in linked_names(str(self)))
            return
        try:
            with answered(str(self)):
                found = server(self.origin).list_with_delimiter(prefix=self._name or None)
        except FileNotFoundError:
            return
        for name in found["common_prefixes"]:
            yield RemotePath(self.origin, PurePosixPath(name))
        for entry in found["objects"]:
            yield RemotePath(self.origin, PurePosixPath(entry["path"]), Stat.of(entry))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yield objects at any depth; folders are no objects."""
        if self.is_web:
            for name in linked_names(str(self)):
                path = self / name
                if name.endswith("/"):
                    yield from path.rglob(pattern)
                elif fnmatchcase(path.name, pattern):
                    yield path
            return
        try:
            with answered(str(self)):
                found = server(self.origin).list(prefix=self._name or None).collect()
        except FileNotFoundError:
            return
        paths = (RemotePath(self.origin, PurePosixPath(entry["path"]), Stat.of(entry)) for entry in found)
        yield from (path for path in paths if fnmatchcase(path.name, pattern))


StorePath = Path | RemotePath
"""Location of a store or of one of its files."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_root(place: str | PathLike[str] | RemotePath) -> StorePath:
    """Make a path of a folder's name or a URL; `file://` and `~` mean local paths. Raises UserError for an unsupported
    URL scheme, or if obstore is not installed."""
    if isinstance(place, RemotePath):
        return place
    scheme, separator, rest = str(place).partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme):
        return Path(place).expanduser() if str(place).startswith("~/") else Path(place)
    if scheme == "file":
        return Path(urllib.parse.unquote(rest))
    bucket, _, key = rest.partition("/")
    if importlib.util.find_spec("obstore") is None:
        raise UserError(f"{place} needs the package 'obstore'; {install_command('remote')}")
    if scheme not in _SCHEMES or not bucket:
        raise UserError(f"{place} is not a URL that mmkd can read, expected {', '.join(_SCHEMES)}")
    return RemotePath(f"{scheme}://{bucket}", PurePosixPath(key))


def name_in(root: StorePath, path: StorePath) -> str:
    """Return the name of a file inside the store at `root`, with `/` between its parts."""
    if isinstance(path, RemotePath) and isinstance(root, RemotePath):
        return str(path.key.relative_to(root.key))
    return Path(str(path)).relative_to(str(root)).as_posix()


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item], root: StorePath) -> Iterator[Result]:
    """`map` in order, a few requests ahead where `root` is remote: every request waits for an answer."""
    if isinstance(root, Path):
        yield from map(function, items)
        return
    waiting = list(items)
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="mmkd-remote") as pool:
        for start in range(0, len(waiting), 4 * REQUESTS):
            yield from pool.map(function, waiting[start : start + 4 * REQUESTS])
