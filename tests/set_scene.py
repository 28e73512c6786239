"""Descriptions of evaluation sets, their rows as extraction reads them, and images to name in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tiny_corpus import png

from mmkd.base.images.decoding import decode
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora import CorpusRow, corpus_rows, open_corpus


def described(folder: Path, source: dict[str, Any], **others: Any) -> Path:
    """The description of an evaluation set `tiny`."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"dataset": "tiny", "modality": "mri", "source": source} | others, sort_keys=False))
    return path


def rows_of(path: Path) -> list[CorpusRow]:
    """As extraction does it: the columns first."""
    corpus = open_corpus(str(path))
    labels = set(corpus.labels)
    rows = list(corpus_rows(corpus))
    assert all(set(row.labels) <= labels for row in rows)
    return rows


def pixels(root: str, row: CorpusRow) -> np.ndarray[Any, Any]:
    assert row.uri is not None
    return np.asarray(decode(image_source(root, row.uri, row.offset, row.length).read()))


def write_images(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))
