"""What corpora made of files have in common: a path or URL, its files by suffix, and a part for each."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import IO, ClassVar

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError
from mmkd.base.places.place import Listed, Place
from mmkd.extract.corpora.row import Part


class FileCorpus(Frozen):
    """A file, or every file with one of `suffixes` below a folder. As YAML, the fields of `corpus.yaml`."""

    path: str
    """Path or URL. In a corpus.yaml, relative to it."""
    only: tuple[str, ...] = ()
    """Patterns of the files to read (`train-*.parquet`) or folders of them; all when not given."""

    suffixes: ClassVar[tuple[str, ...]] = ()

    @functools.cached_property
    def place(self) -> Place:
        """Where it is."""
        return Place.of(self.path)

    @functools.cached_property
    def _is_folder(self) -> bool:
        return self.place.is_dir()

    @property
    def location(self) -> str:
        """The file or folder."""
        return self.path

    @property
    def base(self) -> Place:
        """The folder that part names are relative to, absolute."""
        return (self.place if self._is_folder else self.place.parent).resolved()

    @property
    def root(self) -> str:
        """The same as text."""
        return str(self.base)

    def settings(self) -> str:
        """All fields but the paths."""
        return self.model_dump_json(exclude={"path", "images"})

    def listed(self) -> list[Listed]:
        """The files, sorted by name.

        Raises:
            CorpusError: it cannot be listed.
        """
        try:
            if not self._is_folder:
                return [self.place.listed()]
            files = (file for file in self.place.files() if file.name.lower().endswith(self.suffixes))
            return [file for file in files if not self.only or fits(file.name, self.only)]
        except OSError as error:
            raise unlistable(self.place, error) from error

    def parts(self) -> Sequence[Part]:
        """One for each file."""
        return [Part(file.name, file.size, file.stamp) for file in self.listed()]

    def hashed_part(self, file: Listed) -> Part:
        """The part of one file by its content: its stamp is the SHA-256 of the bytes, so that a copy is the same."""
        with self.opened(Part(file.name, file.size, file.stamp)) as handle:
            content = hashlib.file_digest(handle, "sha256")  # type: ignore[arg-type]  # typeshed wants readinto
        return Part(file.name, file.size, content.hexdigest())

    def opened(self, part: Part) -> IO[bytes]:
        """A part's file.

        Raises:
            CorpusError: it cannot be read.
        """
        try:
            return self.base.join(part.name).open()
        except OSError as error:
            raise unlistable(self.base.join(part.name), error) from error


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern means this file or folder, itself or by a folder above it."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*") for pattern in patterns)


def unlistable(place: Place, error: OSError) -> CorpusError:
    """One line for a corpus that cannot be read."""
    return CorpusError(f"corpus {place} cannot be read: {error.strerror or error}; check the path and its permissions")
