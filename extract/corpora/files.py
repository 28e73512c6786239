"""Corpora made of files: a path or URL, its files by suffix, and a part for each."""

import functools
import hashlib
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, ClassVar

from pydantic import PrivateAttr

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError, UnreachableError
from mmkd.base.images.uri import leaves_root, split_fragment
from mmkd.base.places.reading import Listed, join, list_files, open_file, stat_file
from mmkd.base.places.remote import StorePath, as_root
from mmkd.extract.corpora.row import CorpusRow, Ignored, Part

# Suffixes in lower case and with their dot: they decide a corpus' kind and which of its files are read.
TABLES = (".csv", ".tsv", ".jsonl")
PICTURES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".jfif", ".jpe", ".avif", ".heic"),
    *(".heif", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""In the order in which one of several images of a sample is chosen. Those that Pillow cannot decode fail their row."""
DICOM = (".dcm", ".dicom", ".ima")
TEXTS = (".txt", ".caption", ".json")
"""Captions beside an image, in the order in which one is chosen."""
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
"""Without TIFF, which is a picture unless with `kind: slides`."""

# A folder that holds such a file, and beside it one of the others, was written by mmkd. A slash ends a folder's name.
_WRITTEN_BY_MMKD = {
    "zarr.json": ("a store", ("samples/",)),
    "run.json": ("a training run", ("checkpoints/", "tokens/")),
    "mmkd_run.json": ("an exported student", ("open_clip_config.json",)),
    "results.jsonl": ("an evaluation", ("plans/",)),
}


class FileCorpus(Frozen):
    """A file, or every file with one of `suffixes` below a folder; the fields are those of a `corpus.yaml`."""

    kind: str
    path: str
    """Path or URL. In a corpus.yaml, relative to it."""
    only: tuple[str, ...] = ()
    """Patterns of the files to read (`train-*.parquet`) or folders of them; all when not given."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of part files, in lower case."""
    named_by_rows: ClassVar[tuple[str, ...]] = ()
    """Suffixes of other files, which rows may name; those that no row names are counted."""
    by_content: ClassVar[bool] = False
    """True where the stamp of a part is the SHA-256 of its bytes, so that a copy is the same corpus."""

    _found_in: StorePath | None = PrivateAttr(None)
    """Folder that the user named where one file of it is the corpus: what else it holds is counted."""
    _described_by: str | None = PrivateAttr(None)
    """Absolute path of the corpus.yaml."""

    @functools.cached_property
    def place(self) -> StorePath:
        return as_root(self.path)

    @functools.cached_property
    def _is_folder(self) -> bool:
        return self.place.is_dir()

    @property
    def location(self) -> str:
        return self.path

    @property
    def base(self) -> StorePath:
        """The folder that part names are relative to, absolute."""
        return (self.place if self._is_folder else self.place.parent).resolve()

    @functools.cached_property
    def root(self) -> str:
        """The folder that image paths are relative to: the field `images` of a reader that has it, else `base`."""
        images: str | None = getattr(self, "images", None)
        return str(self.base if images is None else as_root(images).resolve())

    @property
    def labels(self) -> tuple[str, ...]:
        return ()

    @property
    def names_files(self) -> bool:
        """True when rows name files with `named_by_rows` suffixes."""
        return bool(self.named_by_rows)

    def settings(self) -> str:
        """Return all fields but the paths."""
        # Fields that stores of earlier versions do not know count only where they are set.
        later = {"texts", "further", "kind_column"} - self.model_fields_set
        return self.model_dump_json(exclude={"path", "images"} | later)

    def files(self) -> list[Listed]:
        """Return the files, sorted by name. Raises CorpusError if they cannot be listed."""
        with corpus_errors(self.place):
            if not self._is_folder:
                return [stat_file(self.place)]
            files = [file for file in corpus_files(self.place)[0] if self._takes(file.name)]
        return [file for file in files if not self.only or fits(file.name, self.only)]

    @functools.cached_property
    def folders(self) -> dict[str, list[Listed]]:
        """Files by top folder, '' for those beside the folders; both in order."""
        found = defaultdict(list)
        for file in self.files():
            found[file.name.rpartition("/")[0].split("/")[0]].append(file)
        return dict(sorted(found.items()))

    def ignored(self) -> Iterator[Ignored]:
        """Yield files and folders below a folder that are neither a part nor named by a row."""
        folder = self.place if self._is_folder else self._found_in
        if folder is None:
            return
        files, outputs = corpus_files(folder)
        yield from (Ignored(f"folder: {what} of mmkd, never part of a corpus", name) for name, what in outputs)
        base, pictures = str(self.base), {}
        for file in files:
            used = self._takes(file.name) if self._is_folder else file.name == self.place.name
            if not used and file.name.lower().endswith(self.named_by_rows or ("\0",)):
                pictures[posixpath.normpath(posixpath.join(base, file.name))] = file.name
            elif not used and posixpath.join(base, file.name) != self._described_by:
                yield Ignored(f"file: {suffix_of(file.name)} is not read in a corpus of kind {self.kind}", file.name)
            elif used and self.only and not fits(file.name, self.only):
                yield Ignored("file: not among `only`", file.name)
        root, named = self.root, self.parts() if pictures and self.names_files else ()
        for row in (row for part in named for row in self.rows_of(part)):
            if isinstance(row, CorpusRow) and row.uri is not None:
                pictures.pop(posixpath.normpath(posixpath.join(root, split_fragment(row.uri)[0])), None)
        yield from (Ignored("image: no row names it", name) for name in pictures.values())

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        raise NotImplementedError

    def _takes(self, name: str) -> bool:
        return name.lower().endswith(self.suffixes)

    def image_uri(self, image: str, root: str) -> str:
        """Return an image path of a row as a path below `root`, which is absolute. `file://` and `~` are resolved. A
        path that leaves `root` and comes back, perhaps through a link, becomes relative. If a path names no file, the
        same path with slashes for backslashes, or in the other Unicode normal form, is taken if that one exists."""
        image = image.removeprefix("file://")
        if "://" in root or "://" in image or "\0" in image:
            return image
        if image.startswith("~/") and not Path(root, image).exists():
            image = str(Path(image).expanduser())
        if leaves_root(root, image):
            whole = posixpath.join(root, image)
            folder, name = posixpath.split(whole)
            for real in (f"{_real_path(folder)}/{name}", os.path.realpath(whole)):
                if real.startswith(f"{root}/"):
                    return real.removeprefix(f"{root}/")
            return image
        if (image.isascii() and "\\" not in image) or Path(root, image).exists():
            return image
        slashed = image.replace("\\", "/")
        others = (slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
        return next((one for one in others if Path(root, one).exists()), image)

    def parts(self) -> Sequence[Part]:
        parts = [Part(file.name, file.size, file.stamp) for file in self.files()]
        for number, part in enumerate(parts if self.by_content else ()):
            with self.open_part(part) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed: readinto
            parts[number] = replace(part, stamp=digest)
        return parts

    def open_part(self, part: Part) -> IO[bytes]:
        """Return a part's file. Raises CorpusError if it cannot be read."""
        place = join(self.base, part.name)
        with corpus_errors(place):
            return open_file(place)


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Return True when a pattern matches this file or folder, or a folder above it."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*") for pattern in patterns)


@contextmanager
def corpus_errors(place: StorePath) -> Iterator[None]:
    """Raise CorpusError when what lies at `place` cannot be read."""
    try:
        yield
    except UnreachableError as error:
        raise CorpusError(f"corpus {place} cannot be read: {error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise CorpusError(f"corpus {place} cannot be read: {reason}; check the path and its permissions") from error


def corpus_files(place: StorePath) -> tuple[list[Listed], list[tuple[str, str]]]:
    """Return files below a folder without those that mmkd wrote, and the folders of these with what they are. Raises
    OSError if it cannot be listed; CorpusError if `place` itself was written by mmkd."""
    files = list(list_files(place))
    names = {file.name for file in files}
    outputs: dict[str, str] = {}
    for name in names:
        what, others = _WRITTEN_BY_MMKD.get(name.rpartition("/")[2], ("", ()))
        folder = name[: name.rfind("/") + 1]
        for inside in (folder + other for other in others):
            if inside in names or (inside[-1] == "/" and any(one.startswith(inside) for one in names)):
                outputs[folder] = what
    if "" in outputs:
        raise CorpusError(f"{place} is {outputs['']} of mmkd, not a corpus; name the folder with the images")
    files = [file for file in files if not file.name.startswith(tuple(outputs))]
    return files, sorted((folder.rstrip("/"), what) for folder, what in outputs.items())


def folder_parts(folders: Mapping[str, Sequence[Listed]]) -> list[Part]:
    """Return a part for each group of files; its stamp is a hash over their names, sizes and stamps."""
    return [
        Part(name, sum(file.size for file in files), hashlib.sha256(repr(files).encode()).hexdigest())
        for name, files in folders.items()
    ]


def suffix_of(name: str) -> str:
    """Return suffix of a file or member as a reason names it."""
    return posixpath.splitext(name)[1].lower()[:20] or "a name without suffix"


_real_path = functools.lru_cache(maxsize=1024)(os.path.realpath)
