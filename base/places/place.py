"""A file or folder that someone named: on this machine, or behind a URL that fsspec knows (s3, gs, https, file)."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmkd.base.errors import UserError

# Bytes. A range up to this is asked for as it is.
_LONG = 1 << 28
# What services and their packages call the tag or time that changes with a file.
_STAMPS = ("e_tag", "ETag", "etag", "last_modified", "LastModified", "mtime", "updated")
# What fsspec's file systems raise besides OSError: a botched URL, a key that is not there, a service that says no.
# Their packages are extras and cannot be named here, so anything of theirs is recognised by its module.
_FOREIGN = ("obstore.", "botocore.", "aiohttp.", "gcsfs.", "s3fs.", "adlfs.", "fsspec.")
# Served by obstore, one wheel without a chain of pinned clients; it reads AWS_ENDPOINT_URL and its kin.
_CLOUDS = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")


@dataclass(frozen=True)
class Listed:
    """One file below a folder."""

    name: str
    """Relative to the folder, with `/` between."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the file does: change time in ns, or the service's own tag (ETag, Last-Modified)."""


@dataclass(frozen=True)
class Place:
    """A path or URL. Local ones are read through `pathlib`, all others through fsspec."""

    url: str

    @classmethod
    def of(cls, location: str | os.PathLike[str]) -> Place:
        """Make a place of what a user wrote; `file://` is a local path.

        Raises:
            UserError: the URL's kind is unknown, or its package is not installed.
        """
        text = os.fspath(location)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        if text.startswith("~"):
            text = str(Path(text).expanduser())
        place = cls(text if "://" in text else os.path.normpath(text))
        if place.remote:
            _ = place._fs  # an unknown protocol is said now, not by the first worker
        return place

    @property
    def remote(self) -> bool:
        """True behind a URL."""
        return "://" in self.url

    @property
    def path(self) -> Path:
        """The local path; meaningless behind a URL."""
        return Path(self.url)

    @property
    def name(self) -> str:
        """Last component."""
        return posixpath.basename(self.url.rstrip("/")) if self.remote else self.path.name

    @property
    def suffix(self) -> str:
        """Of the last component, in lower case, with its dot."""
        return posixpath.splitext(self.name.partition("?")[0])[1].lower()

    @property
    def parent(self) -> Place:
        """The folder that holds it."""
        return Place(posixpath.dirname(self.url.rstrip("/")) if self.remote else str(self.path.parent))

    def resolved(self) -> Place:
        """Absolute, for a record that must be found again from another working directory."""
        return self if self.remote else Place(str(self.path.resolve()))

    def join(self, name: str | os.PathLike[str]) -> Place:
        """What `name` means seen from this folder; absolute paths and URLs stand for themselves."""
        text = os.fspath(name)
        if "://" in text:
            return Place.of(text)
        if self.remote:
            return Place(f"{self.url.rstrip('/')}/{text}")
        return Place(os.path.normpath(self.path / text))

    def exists(self) -> bool:
        """True when something is there."""
        if not self.remote:
            return self.path.exists()
        try:
            # Plain web servers know files only: asking them for a folder is answered by errors and retries.
            with foreign_errors():
                return bool(self._fs.info(self._inner) if self._web else self._fs.exists(self._inner))
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """True for a folder, or a prefix with something below it; never on a plain web server."""
        if not self.remote:
            return self.path.is_dir()
        if self._web:
            return False
        with foreign_errors():
            return not self._fs.isfile(self._inner) and bool(self._fs.isdir(self._inner))

    def open(self) -> IO[bytes]:
        """Open for reading.

        Raises:
            OSError: missing, not ours to read, or no ordinary file (a pipe would block for ever).
        """
        if not self.remote:
            file = open(self.path, "rb", opener=_without_waiting)  # noqa: SIM115 - Path.open takes no opener
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.close()
                raise OSError(None, "not an ordinary file")
            return file
        with foreign_errors():
            opened: IO[bytes] = self._fs.open(self._inner, "rb")
            return opened

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset` on.

        Raises:
            OSError: as `open`.
        """
        if not self.remote:
            with self.open() as file:
                file.seek(offset)
                return file.read(length)
        with foreign_errors():
            # Services answer an empty range, or one that begins behind the end, with an error. An archive's member was
            # inside when it was listed; a whole file is asked for its size first.
            if length > _LONG:
                length = min(length, int(self._fs.info(self._inner).get("size") or 0) - offset)
            if length <= 0:
                return b""
            data: bytes = self._fs.cat_file(self._inner, start=offset, end=offset + length)
            return data

    def listed(self) -> Listed:
        """Size and stamp of this file.

        Raises:
            OSError: it is not there.
        """
        if not self.remote:
            found = self.path.stat()
            return Listed(self.name, found.st_size, str(found.st_mtime_ns))
        with foreign_errors():
            return _listed(self.name, self._fs.info(self._inner))

    def files(self) -> Iterator[Listed]:
        """All files below this folder, sorted by name; hidden ones are left out, links to folders are followed once.

        A link to a file that is not there (of git-annex before `get`) is listed as an empty file.

        Raises:
            OSError: it cannot be listed.
        """
        if not self.remote:
            yield from sorted(_walk(self.path), key=lambda listed: listed.name)
            return
        with foreign_errors():
            self._fs.invalidate_cache()  # a corpus that changed must be seen to have
            found = self._fs.find(self._inner, detail=True)
        prefix = self.url.partition("://")[2].rstrip("/") + "/"
        for inner, info in sorted(found.items()):
            name = inner.lstrip("/").removeprefix(prefix)
            if not any(part.startswith(".") for part in name.split("/")):
                yield _listed(name, info)

    @property
    def _web(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    @property
    def _fs(self) -> Any:
        return _file_system(self.url)[0]

    @property
    def _inner(self) -> str:
        inner: str = _file_system(self.url)[1]
        return inner

    def __str__(self) -> str:
        return self.url


class RemoteError(OSError):
    """A service did not give what was asked for; `strerror` says why in its own words."""


class foreign_errors:  # noqa: N801 - reads as the context manager that it is
    """Turn what a service's package raises into an OSError with one line; its own errors name hosts and requests."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError):
            module = f"{type(error).__module__}."
            if module.startswith(_FOREIGN):
                raise RemoteError(None, " ".join(str(error).split())[:200]) from error
        elif isinstance(error, OSError) and error.errno is None and not isinstance(error, FileNotFoundError):
            raise RemoteError(None, " ".join(str(error).split())[:200]) from error


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec  # noqa: PLC0415 - an extra

        kind = url.partition("://")[0]
        # Both keep one file system for each set of options, so this is a look-up.
        if kind in _CLOUDS:
            from obstore.fsspec import FsspecStore  # noqa: PLC0415 - an extra

            fs = FsspecStore(kind, client_options={"allow_http": True})
            return fs, fs._strip_protocol(url)
        fs, inner = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        kind = url.partition("://")[0]
        raise UserError(
            f"cannot open {kind}:// addresses ({error}); install mmkd[remote], or copy {url} to this machine"
        ) from error
    return fs, inner


def _without_waiting(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever. Ordinary files do not care.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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


def _listed(name: str, info: dict[str, Any]) -> Listed:
    stamps = (info.get(key) for key in _STAMPS)
    return Listed(name, int(info.get("size") or 0), str(next((stamp for stamp in stamps if stamp), "")))
