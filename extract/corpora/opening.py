"""Detection of a corpus and its reader. Readers that need an extra are loaded on use."""

from __future__ import annotations

import functools
import importlib
import posixpath
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mmkd.base.errors import CorpusError, UnreachableError
from mmkd.base.places.reading import join, read_range
from mmkd.base.places.remote import StorePath, as_root
from mmkd.extract.corpora.description import described_corpus
from mmkd.extract.corpora.files import DICOM, PICTURES, SLIDES, TABLES, TEXTS, corpus_files, unlistable
from mmkd.extract.corpora.row import Corpus


class Kind(NamedTuple):
    """Reader of a corpus kind and the signs it is recognized by."""

    module: str
    name: str
    suffixes: tuple[str, ...] = ()
    """Suffixes of this kind; without any, only a corpus.yaml selects it."""
    extra: str = "extract"
    in_folder: Callable[[StorePath, Sequence[str]], bool] | None = None
    """Recognizes a folder by the names below it; any file with one of the suffixes when not given."""


def _any(suffixes: tuple[str, ...]) -> Callable[[StorePath, Sequence[str]], bool]:
    return lambda _, names: any(name.lower().endswith(suffixes) for name in names)


def _is_table_folder(_: StorePath, names: Sequence[str]) -> bool:
    return any("/" not in name and name.lower().endswith(TABLES) for name in names)


def _has_pairs(_: StorePath, names: Sequence[str]) -> bool:
    """Return True when an image and a text have one name up to its first dot: `x.jpg`, `x.txt`; `s.in.png`,
    `s.out.txt`."""

    def stems(suffixes: tuple[str, ...]) -> set[str]:
        found = (posixpath.split(name) for name in names if name.lower().endswith(suffixes))
        return {posixpath.join(folder, name.partition(".")[0]) for folder, name in found}

    return not stems(TEXTS).isdisjoint(stems(PICTURES))


def _is_parquet_folder(place: StorePath, names: Sequence[str]) -> bool:
    """Not where pairs lie beside: img2dataset writes its `files` with a Parquet file of metadata."""
    return any(name.lower().endswith(".parquet") for name in names) and not _has_pairs(place, names)


def _has_dicom(place: StorePath, names: Sequence[str]) -> bool:
    bare = [name for name in names if "." not in name.rpartition("/")[2]]
    return any(read_range(join(place, name), 128, 4) == b"DICM" for name in bare[:100])


# In the order in which a folder is taken for a kind: archives hold everything themselves, and a table says what the
# pictures beside it are.
KINDS: dict[str, Kind] = {
    "webdataset": Kind("mmkd.extract.corpora.samples", "WebDatasetCorpus", (".tar",)),
    "parquet": Kind("mmkd.extract.corpora.parquet", "ParquetCorpus", (".parquet",), in_folder=_is_parquet_folder),
    "table": Kind("mmkd.extract.corpora.table", "TableCorpus", TABLES, in_folder=_is_table_folder),
    "dicom": Kind("mmkd.extract.corpora.dicom", "DicomCorpus", DICOM, "dicom"),
    "slides": Kind("mmkd.extract.corpora.slides", "SlidesCorpus", SLIDES, "wsi"),
    "pairs": Kind("mmkd.extract.corpora.samples", "PairsCorpus", in_folder=_has_pairs),
    "imagefolder": Kind("mmkd.extract.corpora.image_folder", "ImageFolderCorpus", in_folder=_any(PICTURES)),
    "medmnist": Kind("mmkd.extract.corpora.medmnist", "MedMnistCorpus", (".npz",)),
    "listfile": Kind("mmkd.extract.corpora.list_file", "ListFileCorpus"),
    "vqa": Kind("mmkd.extract.corpora.questions", "QuestionsCorpus"),
}
_EXPECTED = (
    "a CSV/TSV/JSONL or Parquet file, a .tar, an .npz, a DICOM file, a slide, a folder of one of these, "
    "or a corpus.yaml"
)


def open_corpus(location: str) -> Corpus:
    """Detect the kind of `location` and return its reader. Raises CorpusError if it does not exist or has no known
    kind. Raises ConfigError if the YAML has an unknown or wrong field. Raises UserError if the URL's kind is unknown,
    or a package is missing.

    Args:
        location: path or URL of a CSV, TSV, JSONL or Parquet file, a `.tar`, a DICOM file or a slide; of a folder that
            holds tars, Parquet files, one table, DICOM files, slides, images with texts, or folders of images; or of a
            `.yaml` that describes a corpus (its `kind` and that reader's fields) or an evaluation set (`dataset`,
            `source`).
    """
    place = as_root(location)
    suffix = place.suffix.lower()
    try:
        if not place.exists():
            raise CorpusError(f"corpus {location} does not exist; name {_EXPECTED}")
        if suffix in (".yaml", ".yml"):
            return described_corpus(place, {kind: functools.partial(_reader, kind) for kind in KINDS})
        if place.is_dir():
            return _folder(place, location)
    except (OSError, UnreachableError) as error:
        raise unlistable(place, error) from error
    kind = next((kind for kind, known in KINDS.items() if suffix in known.suffixes), None)
    if kind is None:
        raise CorpusError(f"corpus {location}: {suffix or 'a file without suffix'} is not {_EXPECTED}")
    reader: Corpus = _reader(kind)(path=location)
    return reader


def _reader(kind: str) -> Any:
    module, name, _, extra, _ = KINDS[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise CorpusError(f"a {kind} corpus needs {error.name}; install mmkd[{extra}]") from error


def _folder(place: StorePath, location: str) -> Corpus:
    names = [file.name for file in corpus_files(place)[0]]
    kind = next(
        (kind for kind, known in KINDS.items() if (known.in_folder or _any(known.suffixes))(place, names)), None
    )
    if kind is None and _has_dicom(place, names):
        kind = "dicom"
    if kind is None:
        raise CorpusError(f"corpus folder {location} holds neither tars nor tables nor images; expected {_EXPECTED}")
    if kind == "table":
        tables = [name for name in names if "/" not in name and name.lower().endswith(TABLES)]
        if len(tables) > 1:
            raise CorpusError(
                f"corpus folder {location} holds {', '.join(sorted(tables)[:5])}; "
                "expected exactly one CSV, TSV or JSONL file; name the one that is meant"
            )
        location = str(join(place, tables[0]))
    reader = _reader(kind)(path=location)
    if kind == "table":
        reader._found_in = place
    corpus: Corpus = reader
    return corpus
