"""A `.yaml` that describes a corpus or an evaluation set, and the reader that it makes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmkd.base.config import filled, read_mapping, user_roots, validated
from mmkd.base.errors import ConfigError, CorpusError
from mmkd.base.places.reading import join
from mmkd.base.places.remote import RemotePath, StorePath
from mmkd.extract.corpora.evaluation_set import Draw, EvaluationSet
from mmkd.extract.corpora.files import FileCorpus
from mmkd.extract.corpora.join import Join
from mmkd.extract.corpora.row import Corpus
from mmkd.store.evaluation_rows import read_prompts

# Fields that hold a path, relative to the description, so that the two can move together.
_PATHS = ("path", "images", "slide_table")
BAGS = "bags"
"""Kind of a set whose features others made: CLAM's and TRIDENT's `SLIDE.h5`. It is imported, not extracted."""
_NOT_THE_READERS = ("splits", "join", "draw")


def described_corpus(place: StorePath, kinds: Mapping[str, Callable[[], Any]]) -> Corpus:
    """Make the reader that a description asks for. Raises ConfigError for an unknown kind, an unknown or wrong field,
    or a root without a value. Raises CorpusError if what it names does not exist. `place`: the `.yaml`. `kinds`: kind
    to a function that loads its class."""
    if isinstance(place, RemotePath):
        raise CorpusError(f"{place} is a description behind a URL; copy it here, its paths may stay URLs")
    path = place
    content = read_mapping(path)
    roots = user_roots()
    if "suite" in content:
        raise ConfigError(f"{path} is a suite; extract its data sets one by one: `mmkd evaluate check {path}` says how")
    if "dataset" not in content:
        return _reader(filled(content, roots, path), path, kinds)
    return _evaluation_set(content, path, kinds, roots)


def described_bags(path: Path) -> tuple[Path, Join | None]:
    """Return folder and table of an evaluation set of `kind: bags`, whose features others made. Raises ConfigError for
    another kind, or an unknown or wrong field. Raises CorpusError for a table that is not there, or that matches
    something other than slides or patients."""
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


def _reader(content: dict[str, Any], path: Path, kinds: Mapping[str, Callable[[], Any]]) -> Corpus:
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"{path}: kind is {kind!r}, expected one of {', '.join(map(repr, kinds))}")
    beside = path.parent
    for name in _PATHS:
        value = content.get(name)
        if isinstance(value, str):
            value = str(Path(value).expanduser()) if value.startswith("~") else value
            content[name] = str(join(beside, value))
    corpus = validated(kinds[kind](), content, path)
    if isinstance(corpus, FileCorpus):
        corpus._described_by = str(path.resolve())
        if not corpus.place.exists():
            raise CorpusError(f"{path} names {corpus.path}, which does not exist")
    described: Corpus = corpus
    return described


def _evaluation_set(
    content: dict[str, Any], path: Path, kinds: Mapping[str, Callable[[], Any]], roots: dict[str, str]
) -> EvaluationSet:
    name = str(content["dataset"])
    if isinstance(content.get("source"), dict) and content["source"].get("kind") == BAGS:
        raise ConfigError(
            f"{path}: {name} is bags of features; bring them in with: mmkd store import {path} STORE --name MODEL"
        )
    if not isinstance(content.get("source"), dict):
        raise ConfigError(
            f"{path}: {name} has no `source` to read, expected a mapping with `kind` and `path`; "
            "without one its store is made from a corpus of its own"
        )
    source = filled(content["source"], roots | {"dataset": name}, path)
    splits = {str(split): _patterns(patterns, split, path) for split, patterns in (source.get("splits") or {}).items()}
    reader = {key: value for key, value in source.items() if key not in _NOT_THE_READERS}
    alien = next((key for key in reader if difflib.get_close_matches(str(key), _NOT_THE_READERS, cutoff=0.8)), None)
    if alien is not None:
        nearest = difflib.get_close_matches(str(alien), _NOT_THE_READERS, n=1)[0]
        raise ConfigError(f"{path}: source.{alien}: unknown key; did you mean {nearest!r}?")
    if splits and "only" not in reader:
        reader["only"] = [pattern for patterns in splits.values() for pattern in patterns]
    if splits and reader.get("kind") == "imagefolder":
        reader.setdefault("split_folders", True)
    prompts = content.get("prompts") or {}
    file = filled(prompts.get("file"), roots, path) if isinstance(prompts, dict) else None
    if splits and source.get("draw") is not None:
        raise ConfigError(f"{path}: source has `splits` and `draw`; keep the published splits")
    modality = content.get("modality")
    return EvaluationSet(
        name=name,
        source=_reader(reader, path, kinds),
        modality=modality if isinstance(modality, str) else None,
        splits=splits,
        draw=None if source.get("draw") is None else validated(Draw, source["draw"], f"{path}: source.draw"),
        join=None if source.get("join") is None else _join(source["join"], path),
        prompts=None if file is None else read_prompts(path.parent / file),
    )


def _patterns(value: object, split: object, path: Path) -> tuple[str, ...]:
    patterns = value if isinstance(value, list) else [value]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"{path}: source.splits.{split} is {value!r}, expected a file's or folder's name or pattern")
    return tuple(patterns)


def _join(content: object, path: Path) -> Join:
    if isinstance(content, dict):
        if True in content:
            raise ConfigError(f"{path}: YAML reads `on` as true; the field is called `match`")
        content = dict(content)
        if isinstance(content.get("table"), str):
            content["table"] = str((path.parent / Path(content["table"]).expanduser()).resolve())
        if isinstance(content.get("fold_files"), str):
            pattern = path.parent / Path(content["fold_files"]).expanduser()
            files = sorted(pattern.parent.glob(pattern.name), key=lambda file: (len(file.name), file.name))
            if not files:
                raise CorpusError(f"{path}: fold_files is {content['fold_files']!r}, which no file matches")
            content["fold_files"] = [str(file) for file in files]
        elif isinstance(content.get("fold_files"), list):
            content["fold_files"] = [str((path.parent / str(file)).resolve()) for file in content["fold_files"]]
    return validated(Join, content, f"{path}: source.join")
