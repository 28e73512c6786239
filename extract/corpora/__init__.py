"""Corpora: what a user can point `mmkd extract` at. One file per kind; all give the same rows."""

from __future__ import annotations

from pathlib import Path

from mmkd.extract.corpora.row import Corpus, CorpusRow
from mmkd.extract.corpora.table import TABLE_SUFFIXES, TableCorpus
from mmkd.extract.corpora.webdataset import WebDatasetCorpus
from mmkd.store.errors import ConfigError, CorpusError
from mmkd.store.yaml_config import read_mapping, validated

_KINDS: dict[object, type[TableCorpus | WebDatasetCorpus]] = {"table": TableCorpus, "webdataset": WebDatasetCorpus}


def open_corpus(location: str) -> Corpus:
    """Find out what `location` is and return its reader.

    Args:
        location: a CSV, TSV or JSONL file; a `.tar` or a folder of them; a folder that holds one
            table; or a `.yaml` that describes a corpus (`kind: table | webdataset` and its fields).

    Raises:
        CorpusError: it does not exist, or is none of these.
        ConfigError: the YAML has an unknown or wrong field.
    """
    path = Path(location)
    if not path.exists():
        raise CorpusError(
            f"corpus {location} does not exist; name a CSV/TSV/JSONL file, a .tar, a folder or a corpus.yaml"
        )
    if path.suffix in (".yaml", ".yml"):
        return _described(path)
    if path.suffix in TABLE_SUFFIXES:
        return TableCorpus(path=path)
    if path.suffix == ".tar":
        return WebDatasetCorpus(path=path)
    if path.is_dir():
        return _folder(path)
    raise CorpusError(
        f"corpus {location}: {path.suffix or 'a file without suffix'} is not CSV, TSV, JSONL, tar or YAML"
    )


def _folder(path: Path) -> Corpus:
    if any(path.glob("*.tar")):
        return WebDatasetCorpus(path=path)
    tables = sorted(file for file in path.iterdir() if file.suffix in TABLE_SUFFIXES)
    if len(tables) == 1:
        return TableCorpus(path=tables[0])
    found = ", ".join(table.name for table in tables) or "neither tars nor tables"
    raise CorpusError(f"corpus folder {path} holds {found}; expected *.tar or exactly one CSV, TSV or JSONL file")


def _described(path: Path) -> Corpus:
    content = read_mapping(path)
    kind = content.get("kind")
    if kind not in _KINDS:
        raise ConfigError(f"{path}: kind is {kind!r}, expected one of {', '.join(map(repr, _KINDS))}")
    corpus = validated(_KINDS[kind], content, path)
    # Paths in a description are relative to the description, so that the two can move together.
    updates = {"path": path.parent / corpus.path}
    if isinstance(corpus, TableCorpus) and corpus.images is not None:
        updates["images"] = path.parent / corpus.images
    corpus = corpus.model_copy(update=updates)
    if not corpus.path.exists():
        raise CorpusError(f"{path} names {corpus.path}, which does not exist")
    return corpus


__all__ = ["Corpus", "CorpusRow", "TableCorpus", "WebDatasetCorpus", "open_corpus"]
