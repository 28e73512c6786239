"""Find out what a user pointed at, and make its reader. Readers that need an extra are loaded when they are met."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

from mmkd.base.errors import CorpusError
from mmkd.base.places.place import Place
from mmkd.extract.corpora.description import described_corpus
from mmkd.extract.corpora.files import unlistable
from mmkd.extract.corpora.row import Corpus
from mmkd.extract.corpora.suffixes import DICOM, PICTURES, SLIDES, TABLES

# kind: module, class, extra.
_KINDS: dict[str, tuple[str, str, str]] = {
    "table": ("table", "TableCorpus", "extract"),
    "webdataset": ("webdataset", "WebDatasetCorpus", "extract"),
    "parquet": ("parquet", "ParquetCorpus", "extract"),
    "imagefolder": ("image_folder", "ImageFolderCorpus", "extract"),
    "dicom": ("dicom", "DicomCorpus", "dicom"),
    "slides": ("slides", "SlidesCorpus", "wsi"),
    "medmnist": ("medmnist", "MedMnistCorpus", "extract"),
    "listfile": ("list_file", "ListFileCorpus", "extract"),
    "vqa": ("questions", "QuestionsCorpus", "extract"),
}
_KIND_OF = (
    dict.fromkeys(TABLES, "table")
    | {".tar": "webdataset", ".parquet": "parquet", ".npz": "medmnist"}
    | dict.fromkeys(DICOM, "dicom")
    | dict.fromkeys(SLIDES, "slides")
)
_EXPECTED = (
    "a CSV/TSV/JSONL or Parquet file, a .tar, an .npz, a DICOM file, a slide, a folder of one of these, "
    "or a corpus.yaml"
)


def open_corpus(location: str) -> Corpus:
    """Find out what `location` is and return its reader.

    Args:
        location: path or URL of a CSV, TSV, JSONL or Parquet file, a `.tar`, a DICOM file or a slide; of a folder that
            holds tars, Parquet files, one table, DICOM files, slides, or folders of images; or of a `.yaml` that
            describes a corpus (its `kind` and that reader's fields) or an evaluation set (`dataset`, `source`).

    Raises:
        CorpusError: it does not exist, or is none of these.
        ConfigError: the YAML has an unknown or wrong field.
        UserError: the URL's kind is unknown, or a package is missing.
    """
    place = Place.of(location)
    try:
        if not place.exists():
            raise CorpusError(f"corpus {location} does not exist; name {_EXPECTED}")
        if place.suffix in (".yaml", ".yml"):
            return described_corpus(place, {kind: functools.partial(_reader, kind) for kind in _KINDS})
        if place.suffix in _KIND_OF and not place.is_dir():
            reader: Corpus = _reader(_KIND_OF[place.suffix])(path=location)
            return reader
        if place.is_dir():
            return _folder(place, location)
    except OSError as error:
        raise unlistable(place, error) from error
    raise CorpusError(f"corpus {location}: {place.suffix or 'a file without suffix'} is not {_EXPECTED}")


def _reader(kind: str) -> Any:
    module, name, extra = _KINDS[kind]
    try:
        return getattr(importlib.import_module(f"mmkd.extract.corpora.{module}"), name)
    except ImportError as error:
        raise CorpusError(f"a {kind} corpus needs {error.name}; install mmkd[{extra}]") from error


def _folder(place: Place, location: str) -> Corpus:
    names = [file.name.lower() for file in place.files()]
    top = [name for name in names if "/" not in name and name.endswith(TABLES)]
    # A table says what the pictures and DICOM files beside it are; archives hold everything themselves.
    for kind, suffixes in (("webdataset", (".tar",)), ("parquet", (".parquet",))):
        if _any(names, suffixes):
            reader: Corpus = _reader(kind)(path=location)
            return reader
    if len(top) == 1:
        table: Corpus = _reader("table")(path=str(place.join(_exact(place, top[0]))))
        return table
    if len(top) > 1:
        raise CorpusError(
            f"corpus folder {location} holds {', '.join(sorted(top)[:5])}; "
            "expected exactly one CSV, TSV or JSONL file; name the one that is meant"
        )
    pictures = [name for name in names if name.endswith(PICTURES)]
    bare = [name for name in names if "." not in name.rpartition("/")[2]]
    for kind, found in (
        ("dicom", _any(names, DICOM)),
        ("slides", _any(names, SLIDES)),
        ("imagefolder", bool(pictures)),
        ("dicom", any(_says_dicom(place, name) for name in bare[:100])),
    ):
        if found:
            found_reader: Corpus = _reader(kind)(path=location)
            return found_reader
    raise CorpusError(f"corpus folder {location} holds neither tars nor tables nor images; expected {_EXPECTED}")


def _any(names: Iterable[str], suffixes: tuple[str, ...]) -> bool:
    return any(name.endswith(suffixes) for name in names)


def _exact(place: Place, lower: str) -> str:
    return next(file.name for file in place.files() if file.name.lower() == lower)


def _says_dicom(place: Place, lower: str) -> bool:
    return place.join(_exact(place, lower)).read(128, 4) == b"DICM"
