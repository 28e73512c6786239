"""Corpora made of files: a path or URL, its files by suffix, and a part for each."""

from __future__ import annotations

import functools
import hashlib
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, ClassVar

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError, UnreachableError
from mmkd.base.images.uri import leaves_root
from mmkd.base.places.reading import Listed, join, list_files, open_file, stat_file
from mmkd.base.places.remote import StorePath, as_root
from mmkd.extract.corpora.row import Ignored, Part

# Files that together say that a folder was written by mmkd: a store, a training run, an evaluation.
_WRITTEN_BY_MMKD = (
    ("a store", "zarr.json", "samples/"),
    ("a training run", "run.json", "source.json"),
    ("an evaluation", "results.jsonl", "plan.json"),
)


class FileCorpus(Frozen):
    """A file, or every file with one of `suffixes` below a folder. As YAML, the fields of `corpus.yaml`."""

    kind: str
    path: str
    """Path or URL. In a corpus.yaml, relative to it."""
    only: tuple[str, ...] = ()
    """Patterns of the files to read (`train-*.parquet`) or folders of them; all when not given."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of the files that are parts, in lower case."""
    named_by_rows: ClassVar[tuple[str, ...]] = ()
    """Suffixes of other files, which rows may name: they are not counted as ignored."""

    @functools.cached_property
    def place(self) -> StorePath:
        """Where it is."""
        return as_root(self.path)

    @functools.cached_property
    def _is_folder(self) -> bool:
        return self.place.is_dir()

    @property
    def location(self) -> str:
        """The file or folder."""
        return self.path

    @property
    def base(self) -> StorePath:
        """The folder that part names are relative to, absolute."""
        return (self.place if self._is_folder else self.place.parent).resolve()

    @property
    def root(self) -> str:
        """The same as text."""
        return str(self.base)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the label columns; none unless the kind has some."""
        return ()

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
                return [stat_file(self.place)]
            return [file for file in corpus_files(self.place)[0] if self._takes(file.name) and self._chosen(file.name)]
        except (OSError, UnreachableError) as error:
            raise unlistable(self.place, error) from error

    def ignored(self) -> Iterator[Ignored]:
        """Files and folders below a folder that are no part."""
        if not self._is_folder:
            return
        files, outputs = corpus_files(self.place)
        yield from (Ignored(f"folder: {what} of mmkd, never part of a corpus", folder) for folder, what in outputs)
        for file in files:
            if not self._takes(file.name) and not file.name.lower().endswith(self.named_by_rows or ("\0",)):
                yield Ignored(f"file: {suffix_of(file.name)} is not read in a corpus of kind {self.kind}", file.name)
            elif self._takes(file.name) and not self._chosen(file.name):
                yield Ignored("file: not among `only`", file.name)

    def _takes(self, name: str) -> bool:
        return name.lower().endswith(self.suffixes)

    def _chosen(self, name: str) -> bool:
        return not self.only or fits(name, self.only)

    def image_uri(self, image: str, root: str) -> str:
        """An image path of a row as a path below `root`, which is absolute.

        An absolute path that reaches `root` through a link becomes relative. Of a path that names no file, the same
        path with slashes for backslashes, or in the other Unicode normal form, is taken when that file exists.
        """
        if "://" in root or "://" in image or "\0" in image:
            return image
        if image.startswith("/") and leaves_root(root, image):
            folder, name = posixpath.split(image)
            real = f"{_real_folder(folder)}/"
            return f"{real}{name}".removeprefix(f"{root}/") if real.startswith(f"{root}/") else image
        if (image.isascii() and "\\" not in image) or Path(root, image).exists():
            return image
        slashed = image.replace("\\", "/")
        others = (slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
        return next((one for one in others if Path(root, one).exists()), image)

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
            return open_file(join(self.base, part.name))
        except (OSError, UnreachableError) as error:
            raise unlistable(join(self.base, part.name), error) from error


def fits(name: str, patterns: Sequence[str]) -> bool:
    """True when a pattern matches this file or folder, or a folder above it."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*") for pattern in patterns)


def unlistable(place: StorePath, error: OSError | UnreachableError) -> CorpusError:
    """Error for a corpus that cannot be read."""
    if isinstance(error, UnreachableError):
        return CorpusError(f"corpus {place} cannot be read: {error}")
    return CorpusError(f"corpus {place} cannot be read: {error.strerror or error}; check the path and its permissions")


def corpus_files(place: StorePath) -> tuple[list[Listed], list[tuple[str, str]]]:
    """Files below a folder without those that mmkd wrote, and the folders of these with what they are.

    Raises:
        OSError: it cannot be listed.
        CorpusError: `place` itself was written by mmkd.
    """
    files = list(list_files(place))
    names = {file.name for file in files}
    outputs: dict[str, str] = {}
    for what, first, second in _WRITTEN_BY_MMKD:
        for name in names:
            if name.rpartition("/")[2] == first:
                folder = name.removesuffix(first)
                inside = f"{folder}{second}"
                if inside in names or (second.endswith("/") and any(other.startswith(inside) for other in names)):
                    outputs[folder] = what
    if "" in outputs:
        raise CorpusError(f"{place} is {outputs['']} of mmkd, not a corpus; name the folder with the images")
    if outputs:
        prefixes = tuple(outputs)
        files = [file for file in files if not file.name.startswith(prefixes)]
    return files, sorted((folder.rstrip("/"), what) for folder, what in outputs.items())


def suffix_of(name: str) -> str:
    """Suffix of a file or member as a reason names it."""
    return posixpath.splitext(name)[1].lower()[:20] or "a name without suffix"


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
