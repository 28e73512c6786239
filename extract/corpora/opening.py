"""Opening a corpus: its kind by its files, or by a `.yaml` that describes it or an evaluation set. Readers that need an
extra are loaded on use."""

import difflib
import posixpath
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mmkd.base.config import filled, read_mapping, user_roots, validated
from mmkd.base.errors import ConfigError, CorpusError
from mmkd.base.install import import_extra
from mmkd.base.places.reading import join, read_range
from mmkd.base.places.remote import RemotePath, StorePath, as_root
from mmkd.extract.corpora.evaluation_set import Draw, EvaluationSet, Join
from mmkd.extract.corpora.files import DICOM, PICTURES, SLIDES, TABLES, TEXTS, FileCorpus, corpus_errors, corpus_files
from mmkd.extract.corpora.row import Corpus
from mmkd.store.evaluation_rows import read_prompts

# Fields that hold a path, relative to the description, so that the two can move together.
_PATHS = ("path", "images", "slide_table")
BAGS = "bags"
"""Kind of a set whose features others made: CLAM's and TRIDENT's `SLIDE.h5`. It is imported, not extracted."""
_NOT_THE_READERS = ("splits", "join", "draw")


class Kind(NamedTuple):
    """Reader of a corpus kind and the signs it is recognized by."""

    module: str
    name: str
    suffixes: tuple[str, ...] = ()
    """Suffixes of this kind; without any, only a corpus.yaml selects it."""
    extra: str = "extract"
    in_folder: Callable[[Sequence[str]], bool] | None = None
    """Recognizes a folder by the names below it; any file with one of the suffixes when not given."""


def _tables(names: Sequence[str]) -> list[str]:
    return [name for name in names if "/" not in name and name.lower().endswith(TABLES)]


def _have_suffix(suffixes: tuple[str, ...], names: Sequence[str]) -> bool:
    return any(name.lower().endswith(suffixes) for name in names)


def _has_pairs(names: Sequence[str]) -> bool:
    """Return True when an image and a text have one name up to its first dot: `s.in.png`, `s.out.txt`."""

    def stems(suffixes: tuple[str, ...]) -> set[str]:
        found = (posixpath.split(name) for name in names if name.lower().endswith(suffixes))
        return {posixpath.join(folder, name.partition(".")[0]) for folder, name in found}

    return not stems(TEXTS).isdisjoint(stems(PICTURES))


# In the order in which a folder is taken for a kind: archives hold everything themselves, and a table says what the
# pictures beside it are.
KINDS: dict[str, Kind] = {
    "webdataset": Kind("mmkd.extract.corpora.samples", "WebDatasetCorpus", (".tar",)),
    # Not where pairs lie beside: img2dataset writes its `files` with a Parquet file of metadata.
    "parquet": Kind(
        *("mmkd.extract.corpora.parquet", "ParquetCorpus", (".parquet",)),
        in_folder=lambda names: _have_suffix((".parquet",), names) and not _has_pairs(names),
    ),
    "table": Kind("mmkd.extract.corpora.table", "TableCorpus", TABLES, in_folder=lambda names: bool(_tables(names))),
    "dicom": Kind("mmkd.extract.corpora.dicom", "DicomCorpus", DICOM, "dicom"),
    "slides": Kind("mmkd.extract.corpora.slides", "SlidesCorpus", SLIDES, "wsi"),
    "pairs": Kind("mmkd.extract.corpora.samples", "PairsCorpus", in_folder=_has_pairs),
    "imagefolder": Kind("mmkd.extract.corpora.labeled", "ImageFolderCorpus", in_folder=partial(_have_suffix, PICTURES)),
    "medmnist": Kind("mmkd.extract.corpora.medmnist", "MedMnistCorpus", (".npz",)),
    "listfile": Kind("mmkd.extract.corpora.labeled", "ListFileCorpus"),
    "vqa": Kind("mmkd.extract.corpora.questions", "QuestionsCorpus"),
}
_KNOWN = (
    "a CSV/TSV/JSONL or Parquet file, a .tar, an .npz, a DICOM file, a slide, a folder of one of these, "
    "or a corpus.yaml"
)


def open_corpus(location: str) -> Corpus:
    """Return the reader of a corpus by its path or URL: a file or folder of a kind in `KINDS`, or a `.yaml` that
    describes a corpus (its `kind` and that reader's fields) or an evaluation set (`dataset`, `source`). Raises
    CorpusError if it does not exist, has no known kind, or a package is missing; ConfigError for a wrong field;
    UserError if the URL's scheme is unknown."""
    place = as_root(location)
    suffix = place.suffix.lower()
    with corpus_errors(place):
        if not place.exists():
            raise CorpusError(f"corpus {location} does not exist; name {_KNOWN}")
        if suffix in (".yaml", ".yml"):
            return _read_description(place)
        if place.is_dir():
            return _folder(place, location)
    if (kind := next((kind for kind, known in KINDS.items() if suffix in known.suffixes), None)) is None:
        raise CorpusError(f"corpus {location}: {suffix or 'a file without suffix'} is not {_KNOWN}")
    return _reader(kind)(path=location)


def _reader(kind: str) -> Any:
    module, name, _, extra, _ = KINDS[kind]
    return getattr(import_extra(module, extra, f"a {kind} corpus"), name)


def _folder(place: StorePath, location: str) -> Corpus:
    names = [file.name for file in corpus_files(place)[0]]
    kinds = ((kind, known.in_folder or partial(_have_suffix, known.suffixes)) for kind, known in KINDS.items())
    if (kind := next((kind for kind, is_kind in kinds if is_kind(names)), None)) is None:
        bare = [name for name in names if "." not in name.rpartition("/")[2]]
        if not any(read_range(join(place, name), 128, 4) == b"DICM" for name in bare[:100]):
            raise CorpusError(f"corpus folder {location} holds neither tars nor tables nor images; expected {_KNOWN}")
        kind = "dicom"
    if kind == "table":
        tables = _tables(names)
        if len(tables) > 1:
            raise CorpusError(
                f"corpus folder {location} holds {', '.join(sorted(tables)[:5])}; "
                "expected exactly one CSV, TSV or JSONL file; name the one that is meant"
            )
        location = str(join(place, tables[0]))
    reader: Corpus = _reader(kind)(path=location)
    if isinstance(reader, FileCorpus) and kind == "table":
        reader._found_in = place
    return reader


def _read_description(path: StorePath) -> Corpus:
    if isinstance(path, RemotePath):
        raise CorpusError(f"{path} is a description behind a URL; copy it here, its paths may stay URLs")
    content, roots = read_mapping(path), user_roots()
    if "suite" in content:
        raise ConfigError(f"{path} is a suite; extract its data sets one by one: `mmkd evaluate check {path}` says how")
    if "dataset" in content:
        return _evaluation_set(content, path, roots)
    return _make_reader(filled(content, roots, path), path)


def read_bags(path: Path) -> tuple[Path, Join | None]:
    """Return folder and table of an evaluation set of `kind: bags`, whose features others made. Raises ConfigError for
    another kind, a wrong field, or a table that matches neither slides nor patients."""
    content = read_mapping(path)
    source = content.get("source")
    if not isinstance(source, dict) or source.get("kind") != BAGS:
        raise ConfigError(f"{path} describes no bags (`source: {{kind: {BAGS}, path: ...}}`); extract it: mmkd extract")
    source = filled(source, user_roots() | {"dataset": str(content.get("dataset"))}, path)
    alien = [key for key in source if key not in ("kind", "path", "join")]
    if alien or not isinstance(source.get("path"), str):
        raise ConfigError(f"{path}: source has {', '.join(map(str, source))}; of bags it takes kind, path and join")
    join = None if source.get("join") is None else _join(source["join"], path)
    if join is not None and join.match not in ("slide", "patient"):
        raise ConfigError(f"{path}: join matches {join.match!r}, expected slide or patient")
    return (path.parent / Path(source["path"]).expanduser()).resolve(), join


def _make_reader(content: dict[str, Any], path: Path) -> Corpus:
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{path}: kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    for name in _PATHS:
        value = content.get(name)
        if isinstance(value, str):
            content[name] = str(join(path.parent, str(Path(value).expanduser()) if value.startswith("~") else value))
    corpus: Corpus = validated(_reader(kind), content, path)
    if isinstance(corpus, FileCorpus):
        corpus._described_by = str(path.resolve())
        if not corpus.place.exists():
            raise CorpusError(f"{path} names {corpus.path}, which does not exist")
    return corpus


def _evaluation_set(content: dict[str, Any], path: Path, roots: dict[str, str]) -> EvaluationSet:
    name, source = str(content["dataset"]), content.get("source")
    if not isinstance(source, dict):
        raise ConfigError(
            f"{path}: {name} has no `source` to read, expected a mapping with `kind` and `path`; "
            "without one its store is made from a corpus of its own"
        )
    if source.get("kind") == BAGS:
        raise ConfigError(
            f"{path}: {name} is bags of features; bring them in with: mmkd store import {path} STORE --name MODEL"
        )
    source = filled(source, roots | {"dataset": name}, path)
    splits = {}
    for split, value in (source.get("splits") or {}).items():
        patterns = value if isinstance(value, list) else [value]
        if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ConfigError(
                f"{path}: source.splits.{split} is {value!r}, expected a file's or folder's name or pattern"
            )
        splits[str(split)] = tuple(patterns)
    reader = {key: value for key, value in source.items() if key not in _NOT_THE_READERS}
    for key in reader:
        for nearest in difflib.get_close_matches(str(key), _NOT_THE_READERS, n=1, cutoff=0.8):
            raise ConfigError(f"{path}: source.{key}: unknown key; did you mean {nearest!r}?")
    if splits and "only" not in reader:
        reader["only"] = list(chain.from_iterable(splits.values()))
    if splits and reader.get("kind") == "imagefolder":
        reader.setdefault("split_folders", True)
    prompts, modality = content.get("prompts") or {}, content.get("modality")
    file = filled(prompts.get("file"), roots, path) if isinstance(prompts, dict) else None
    if file is not None and not isinstance(file, str):
        raise ConfigError(f"{path}: prompts.file is {file!r}, expected a path")
    if splits and source.get("draw") is not None:
        raise ConfigError(f"{path}: source has `splits` and `draw`; keep the published splits")
    return EvaluationSet(
        name=name,
        corpus=_make_reader(reader, path),
        modality=modality if isinstance(modality, str) else None,
        splits=splits,
        draw=None if source.get("draw") is None else validated(Draw, source["draw"], f"{path}: source.draw"),
        join=None if source.get("join") is None else _join(source["join"], path),
        prompts=None if file is None else read_prompts(path.parent / file),
    )


def _join(content: object, path: Path) -> Join:
    if isinstance(content, dict):
        if True in content:
            raise ConfigError(f"{path}: YAML reads `on` as true; the field is called `match`")
        content = dict(content)
        if isinstance(content.get("table"), str):
            content["table"] = str((path.parent / Path(content["table"]).expanduser()).resolve())
        folds = content.get("fold_files")
        if isinstance(folds, str):
            pattern = path.parent / Path(folds).expanduser()
            files = sorted(pattern.parent.glob(pattern.name), key=lambda file: (len(file.name), file.name))
            if not files:
                raise CorpusError(f"{path}: fold_files is {folds!r}, which no file matches")
            content["fold_files"] = [str(file) for file in files]
        elif isinstance(folds, list):
            content["fold_files"] = [str((path.parent / str(file)).resolve()) for file in folds]
    return validated(Join, content, f"{path}: source.join")
