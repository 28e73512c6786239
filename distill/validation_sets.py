"""Held-out sets of a run, read from their stores and compared with the rows that are trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from numpy.typing import NDArray

from mmkd.base.errors import ConfigError, UserError
from mmkd.distill.captions import Captions, tokenised
from mmkd.distill.config import DataConfig, MonitorSet
from mmkd.distill.image_source import row_images
from mmkd.distill.images import RowImages
from mmkd.distill.pairs import Pairs, find_pairs, matching
from mmkd.distill.student import Tokenise
from mmkd.store import FeatureStore


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of one monitor set, found before any network is built, so that mistakes in them show at once."""

    metrics: tuple[str, ...]
    """Names of its scores."""
    store: FeatureStore
    pairs: Pairs
    labels: list[str]
    """Class of each pair; empty for retrieval."""
    prompts: pa.Table | None
    """Columns `caption` and `class`; None for retrieval."""
    digest: str
    """Digest of the rows, images and captions, independent of the store's location."""


@dataclass(frozen=True)
class HeldOut:
    """One monitor set with its tokens and images. captions: of the pairs. labels: int64 (n,), class of each pair, empty
    for retrieval. prompts: captions of the classes, None for retrieval. prompt_labels: int64 (p,), class of each
    prompt."""

    rows: HeldOutRows
    images: RowImages
    captions: Captions
    labels: torch.Tensor
    prompts: Captions | None
    prompt_labels: torch.Tensor


def read_held_out(rows: HeldOutRows, data: DataConfig, side: int, tokenise: Tokenise) -> HeldOut:
    """Find the images of a monitor set, and tokenize its captions and prompts.

    Args:
        rows: of the set.
        data: where images come from.
        side: of the student's image, in pixels.
        tokenise: the student's tokenizer.
    """
    named: list[str] = rows.prompts["class"].to_pylist() if rows.prompts is not None else []
    place = {name: number for number, name in enumerate(sorted(set(named)))}
    return HeldOut(
        rows=rows,
        images=row_images(rows.store, rows.pairs, data.images, side),
        captions=tokenised(rows.pairs.captions, tokenise),
        labels=torch.tensor([place[label] for label in rows.labels], dtype=torch.long),
        prompts=tokenised(rows.prompts["caption"].to_pylist(), tokenise) if rows.prompts is not None else None,
        prompt_labels=torch.tensor([place[name] for name in named], dtype=torch.long),
    )


def find_held_out(entry: MonitorSet, run_store: FeatureStore, training: Pairs) -> HeldOutRows:
    """Draw `limit` of the rows that match a monitor set, as evenly over the classes as they allow. Raises ConfigError
    if a pair of image and caption is trained on as well, in whichever store it lies. Raises UserError if there is no
    row matches, a row has no class, or prompts and limit do not cover the classes. Raises IncompleteStoreError if rows
    that match have not been extracted yet.

    Args:
        entry: the set's configuration.
        run_store: the store that is trained on.
        training: its rows that are trained on.
    """
    store = run_store if entry.store is None else FeatureStore.open(entry.store)
    pairs = find_pairs(store, entry.where)
    where = f"monitor set {entry.name!r}"
    if len(pairs.rows) < 2:
        raise UserError(f"{where}: {len(pairs.rows)} rows of {store.root} match {entry.where}; change its `where`")
    columns = dict.fromkeys(["caption", "image_sha256", *([entry.label] if entry.label else [])])
    table = store.sample_table(columns=list(columns)).take(pa.array(pairs.rows))
    classes = table[entry.label].cast(pa.string()).to_pylist() if entry.label else [None] * len(table)
    if entry.label and (blank := classes.count(None)):
        raise UserError(f"{where}: {blank} of its rows have no {entry.label}; leave them out with `where`")
    if entry.limit < len(set(classes)):
        raise UserError(f"{where}: limit {entry.limit} is less than its {len(set(classes))} classes; raise it")
    drawn = draw_evenly(classes, entry.limit)
    pairs, table = _take_pairs(pairs, drawn), table.take(pa.array(drawn))
    labels = [classes[place] for place in drawn] if entry.label else []
    both = _rows_in_both(pairs, table, run_store, training)
    if len(both):
        raise ConfigError(
            f"{where}: row {both[0]} and {len(both) - 1} more are trained on too; keep them apart with `where`"
        )
    prompts = None
    if entry.label is not None:
        found = matching(store, entry.prompts, list(dict.fromkeys(["caption", entry.label])))
        prompts = pa.table({"caption": found["caption"], "class": found[entry.label].cast(pa.string())}).drop_null()
        named = sorted(set(prompts["class"].to_pylist()))
        if unknown := sorted(set(labels) - set(named)):
            names = ", ".join(named) or "none"
            raise UserError(f"{where}: no prompt for class {unknown[0]!r}; its prompts name {names}")
        if len(named) < 2:
            raise UserError(f"{where}: its prompts name the one class {named[0]!r}, expected two or more")
    content = json.dumps([table.to_pydict(), prompts.to_pydict() if prompts is not None else None], default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return HeldOutRows(entry.metrics, store, pairs, labels, prompts, digest)


def draw_evenly(classes: list[str | None], limit: int) -> NDArray[np.int64]:
    """Return ascending places of at most `limit` rows: random ones, equally many of each class that has enough. The
    same classes give the same draw."""
    order = np.random.default_rng(0).permutation(len(classes))
    seen: dict[str | None, int] = {}
    turn = np.empty(len(classes), dtype=np.int64)
    for place in order:
        turn[place] = seen[classes[place]] = seen.get(classes[place], -1) + 1
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


def _take_pairs(pairs: Pairs, places: NDArray[np.int64]) -> Pairs:
    encoded = pa.array(pairs.caption[places]).dictionary_encode()
    captions = pairs.captions.take(encoded.dictionary)
    table, numbers = pairs.table.take(pa.array(places)), encoded.indices.to_numpy().astype(np.int64)
    return Pairs(pairs.rows[places], numbers, pairs.image[places], captions, table)


def _rows_in_both(held: Pairs, table: pa.Table, run_store: FeatureStore, training: Pairs) -> list[int]:
    """Return the held-out rows whose image and caption, by content, are trained on."""
    alike = pads.field("image_sha256").isin(table["image_sha256"].combine_chunks().unique())
    found = run_store.sample_table(columns=["row", "caption", "image_sha256"], filter=alike)
    trained = np.isin(found["row"].to_numpy(), training.rows)
    found = found.filter(pa.array(trained))
    known = set(zip(found["image_sha256"].to_pylist(), found["caption"].to_pylist(), strict=True))
    pairs = zip(held.rows.tolist(), table["image_sha256"].to_pylist(), table["caption"].to_pylist(), strict=True)
    return [row for row, image, caption in pairs if (image, caption) in known]
