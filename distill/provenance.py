"""What a run learns from, written down when it begins: the store's content, the teachers, the selection.

OUT/source.json     beside the configuration; the model card is made of it, though the store may be gone by then
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmkd.base.config import Frozen
from mmkd.distill.config import RunConfig
from mmkd.distill.student import model_config
from mmkd.store import FeatureStore
from mmkd.store.selection import read_selection

CONFIG = "run.json"
SOURCE = "source.json"

# What may change between two calls of one run: where it writes, and how the same arithmetic is laid out.
_FREE: Any = {
    "preset": True,
    "store": True,  # its content is in the digest instead: a store may move
    "out": True,
    # The network is in the digest as open_clip describes it; the first weights are in the checkpoint already.
    "student": {"model", "start_from"},
    "data": {"images", "features", "workers"},
    "compute": {"micro_batch", "gradient_checkpointing", "compile", "timeout_minutes"},
    "checkpoints": True,
    "monitor": True,
    "logging": True,
}
_SHOWN = 80
"""Characters of a value in a message."""


class TeacherSource(Frozen):
    """One teacher that was asked, as its card in the store says."""

    slug: str
    source: str
    digest: str
    licence: str


class RunSource(Frozen):
    """The store of a run as it was when the run began."""

    store: str
    """Name of its folder, without the machine's path."""
    store_digest: str
    """Of everything that the run's teachers say: see `store_digest`."""
    rows: int
    corpora: tuple[str, ...]
    """Digests of the corpora, in grid order."""
    teachers: tuple[TeacherSource, ...]
    """None when no loss asks a teacher."""
    selection: str = ""
    """Digest of the selection's values, when there is one."""


def read_source(config: RunConfig, store: FeatureStore) -> RunSource:
    """What `config` learns from.

    Raises:
        UserError: a teacher or the selection is not in the store.
        CorruptStoreError: the selection is damaged.
    """
    asked = config.loss.teacher_terms != ()
    slugs = config.teachers or tuple(store.teachers)
    cards = [store.card(slug) for slug in slugs]
    wanted = config.selection if asked else None
    return RunSource(
        store=store.root.name,
        store_digest=store_digest(store, slugs),
        rows=store.record.rows,
        corpora=tuple(span.corpus.digest for span in store.record.spans()),
        teachers=tuple(
            TeacherSource(slug=card.slug, source=card.source, digest=card.digest, licence=card.licence)
            for card in cards
            if asked
        ),
        selection=read_selection(store.root, store.record, wanted).card.digest if wanted else "",
    )


def store_digest(store: FeatureStore, slugs: tuple[str, ...]) -> str:
    """SHA-256 in hex over the rows, the teachers' digests and all their ledger entries: the features' checksums, how
    many are sound, and the samples' own checksums. A shard that was extracted anew with other rows changes it."""
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


def run_digest(config: RunConfig, source: RunSource) -> str:
    """Digest of what decides a run's outcome: its configuration, the network, and what it learns from."""
    content = {
        "config": config.model_dump(mode="json", exclude=_FREE),
        "network": model_config(config.student.model),
        "store": source.store_digest,
        "selection": source.selection,
        "alignment": _file_digest(config.heads.alignment),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def difference(out: Path, config: RunConfig, source: RunSource) -> str:
    """In words, what keeps `config` from going on with the run that OUT holds; empty when its files do not say.

    At most three keys are named: `epochs was 10, is 20`.
    """
    try:
        was = json.loads((out / CONFIG).read_text("utf-8")), json.loads((out / SOURCE).read_text("utf-8"))
    except (OSError, ValueError):
        return ""  # a run that was killed before it had written them
    now = config.model_dump(mode="json", exclude=_FREE), source.model_dump(mode="json", exclude={"store", "teachers"})
    before, after = ({**_flat(settings), **_flat(learned, "source")} for settings, learned in (was, now))
    found = [
        f"{key} was {before[key]}, is {value}" for key, value in after.items() if key in before and before[key] != value
    ]
    return "; ".join(found[:3]) + (f"; {len(found) - 3} more" if len(found) > 3 else "")


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Every value of nested mappings by its keys with points between them, as JSON."""
    if not isinstance(tree, dict) or not tree:
        text = json.dumps(tree)
        return {prefix: text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."}
    below = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items())
    return {name: value for part in below for name, value in part.items()}


def _file_digest(path: Path | None) -> str:
    """Empty without a file; one that is missing is complained of where it is opened."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else ""
