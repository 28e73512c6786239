"""A small corpus whose images have several captions, described by a corpus.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import yaml
from tiny_corpus import png

FIELDS = {"captions": "further", "further": {"made": "synthetic"}, "kind_column": "kind"}


def described(folder: Path, content: dict[str, object]) -> Path:
    """A corpus.yaml in the folder, with pictures beside it."""
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / "corpus.yaml").write_text(yaml.safe_dump(content))
    return folder / "corpus.yaml"


def write_jsonl(folder: Path, rows: Iterable[dict[str, object]], **fields: object) -> Path:
    """A JSONL corpus of these rows."""
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return described(folder, {"kind": "table", "path": "pairs.jsonl", **FIELDS, **fields})
