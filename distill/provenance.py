"""Record of a run, in every checkpoint: the source of its card and the identity of the run. It contains no path of the
machine, and identifies files by their content."""

import hashlib
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch

from mmkd.base.config import Frozen
from mmkd.base.errors import ConfigError, faults_as
from mmkd.distill.config import RunConfig
from mmkd.distill.student import HF_NAMES, model_config
from mmkd.store import FeatureStore
from mmkd.store.selection import read_selection

# Settings that may change between two calls of one run: where it writes, and how the same arithmetic is carried out.
# Of settings that name files, the content of the files is in the record.
_FREE: Any = {
    "preset": True,
    "store": True,
    "out": True,
    "student": {"model", "start_from", "pretrained"},
    "heads": {"alignment"},
    "data": {"images", "features", "workers", "cache", "cache_gb"},
    "compute": {"micro_batch", "gradient_checkpointing", "compile", "timeout_minutes"},
    "checkpoints": True,
    "monitor": True,
    "logging": True,
}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_TEXT = (".json", ".txt", ".model")
TEXT = "text"
"""Folder of a run with the files that transformers reads of its student: tokenizer, and config of the text tower."""
_SHOWN = 80
"""Characters of a value in a message."""
_LOCAL = re.compile(r'"(local-dir:|/|~|[A-Za-z]:\\)')
"""A text in JSON that names a place on one machine."""


class TeacherSource(Frozen):
    """One teacher of the run, as its card in the store describes it."""

    slug: str
    source: str
    digest: str
    license: str


class RunSource(Frozen):
    """The store of a run as it was when the run began."""

    store: str
    """Name of its folder."""
    store_digest: str
    """See `store_digest`."""
    rows: int
    corpora: tuple[str, ...]
    """Digests of the corpora, in grid order."""
    teachers: tuple[TeacherSource, ...]
    """Empty when no loss needs a teacher."""
    selection: str = ""
    """Digest of the selection's values, when there is one."""


class FirstWeights(Frozen):
    """The weights that the student began with."""

    name: str
    """Tag of open_clip, name of a file or of a run's folder, or `random weights`."""
    digest: str = ""
    """SHA-256 of a file; digest of a run and its step."""


class RunRecord(Frozen):
    """Configuration and sources of a run."""

    config: dict[str, Any]
    """The settings that decide the outcome, with presets under them."""
    presets: tuple[str, ...]
    model: str
    """Name of the network: open_clip's, or of the `.json` file."""
    network: dict[str, Any]
    """The open_clip model config; a folder of transformers' files is `.`."""
    text_files: str
    """SHA-256 of the JSON and text files in such folders."""
    preprocess: dict[str, Any]
    """Size, mean, std and interpolation of images, as open_clip names them."""
    first_weights: FirstWeights
    alignment: str
    """SHA-256 of the alignment file; empty without one."""
    source: RunSource
    versions: dict[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """Values that are equal in all calls of one run."""
        return {
            **self.config,
            "network": self.network,
            "text_files": self.text_files,
            "first_weights": self.first_weights.digest or self.first_weights.name,
            "alignment": self.alignment,
            "source": self.source.model_dump(mode="json", include={"store_digest", "rows", "corpora", "selection"}),
        }

    @property
    def digest(self) -> str:
        """Digest of `identity`, 16 hex digits."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: "RunRecord") -> str:
        """Describe at most three keys that `other` has otherwise: `epochs was 10, is 20`."""
        before, after = _flatten(self.identity), _flatten(other.identity)
        found = [
            f"{key} was {before.get(key, 'not set')}, is {after.get(key, 'not set')}"
            for key in before | after
            if before.get(key) != after.get(key)
        ]
        return "; ".join(found[:3]) + (f"; {len(found) - 3} more" if len(found) > 3 else "")


def make_record(config: RunConfig, store: FeatureStore, first_weights: FirstWeights) -> RunRecord:
    """Make the record of a run; `preprocess` is filled in when the network is built. Raises UserError if a teacher or
    the selection is not in the store; CorruptStoreError if the selection is damaged; ConfigError if the model config
    names a path of this machine that cannot be recorded by its content."""
    model, alignment = config.student.model, config.heads.alignment
    network, text_files = deepcopy(model_config(model)), []
    for name in HF_NAMES:
        if (folder := Path(network["text_cfg"].get(name, ""))).is_absolute():
            text_files.append(content_digest(folder, _TEXT))
            network["text_cfg"][name] = "."
    for key, value in _flatten(network).items():
        if _LOCAL.search(value):
            raise ConfigError(
                f"student.model {model}: {key} is {value}, a path of this machine; name what timm or a hub has"
            )
    learns = config.loss.teacher_terms != ()
    slugs = config.teachers or tuple(store.teachers)
    named = Path(model.removeprefix("local-dir:"))
    free = _FREE if config.data.order == "windows" else _FREE | {"data": _FREE["data"] | {"window"}}
    return RunRecord(
        config=config.model_dump(mode="json", exclude=free),
        presets=tuple(Path(name).name for name in config.preset),
        model=named.absolute().name.removesuffix(".json") if named.exists() else model,
        network=network,
        text_files=",".join(text_files),
        preprocess={},
        first_weights=first_weights,
        alignment=content_digest(alignment) if alignment and alignment.is_file() else "",
        source=RunSource(
            store=store.root.name,
            store_digest=store_digest(store, slugs),
            rows=store.record.rows,
            corpora=tuple(span.corpus.digest for span in store.record.spans()),
            teachers=tuple(
                TeacherSource(slug=card.slug, source=_public(card.source), digest=card.digest, license=card.license)
                for card in map(store.card, slugs)
                if learns
            ),
            selection=read_selection(store, config.selection).card.digest if config.selection and learns else "",
        ),
        versions={"open_clip": open_clip.__version__, "torch": str(torch.__version__)},
    )


def _public(source: str) -> str:
    """Return a teacher's source without the folders of the machine."""
    kind, _, place = source.partition(":")
    return f"{kind}:{Path(place).name}" if kind == "local-dir" or Path(place).is_absolute() else source


def store_digest(store: FeatureStore, slugs: tuple[str, ...]) -> str:
    """Return the SHA-256 in hex over the rows, the teachers' digests and their ledger entries, which hold the checksums
    of features and samples: a shard that was extracted again with other rows changes it."""
    content = {
        "rows": store.record.rows,
        "corpora": [span.corpus.digest for span in store.record.spans()],
        "teachers": {slug: store.card(slug).digest for slug in slugs},
        "shards": [
            entry.model_dump(mode="json", exclude_none=True)
            for (_, slug), entry in sorted(store.ledger.items())
            if slug in slugs
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path, suffixes: tuple[str, ...] = _WEIGHTS) -> str:
    """Return the SHA-256 in hex of a file, or of a folder's files of these suffixes. Raises ConfigError if
    unreadable."""
    with faults_as(ConfigError, OSError, f"cannot read {path}", "; correct the path in the YAML"):
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.suffix in suffixes]
            return hashlib.sha256("\n".join(map(content_digest, files)).encode()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Return values of nested mappings as JSON, by their keys joined with dots."""
    if not isinstance(tree, dict) or not tree:
        text = json.dumps(tree)
        return {prefix: text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."}
    below = (_flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items())
    return {name: value for part in below for name, value in part.items()}
