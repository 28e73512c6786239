"""Held-out sets of a run, read from their stores and held against the rows that are trained on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.distill.captions import tokenised
from mmkd.distill.config import DataConfig, MonitorSet
from mmkd.distill.image_source import row_images
from mmkd.distill.monitor import HeldOut, numbered
from mmkd.distill.pairs import Pairs, find_pairs, matching
from mmkd.distill.student import Tokenise
from mmkd.store import FeatureStore
from mmkd.store.errors import ConfigError, UserError
from mmkd.store.remote import StorePath


def held_out(
    entry: MonitorSet, run_store: FeatureStore, training: Pairs, data: DataConfig, side: int, tokenise: Tokenise
) -> HeldOut:
    """One monitor set, ready to be judged on.

    Args:
        entry: what the configuration says.
        run_store: the store that is trained on.
        training: its rows that are trained on.
        data: where images come from.
        side: of the student's image, in pixels.
        tokenise: the student's tokenizer.

    Raises:
        ConfigError: a row is trained on as well.
        UserError: no row matches, or labels and prompts do not name the same classes.
        IncompleteStoreError: rows that match have not been extracted yet.
    """
    store = run_store if entry.store is None else FeatureStore.open(entry.store)
    pairs = _first(find_pairs(store, entry.where), entry.limit)
    where = f"monitor set {entry.name!r}"
    if len(pairs.rows) < 2:
        raise UserError(f"{where}: {len(pairs.rows)} rows of {store.root} match {entry.where}; change its `where`")
    if _same(store.root, run_store.root):
        both = np.intersect1d(pairs.rows, training.rows)
        if len(both):
            raise ConfigError(
                f"{where}: row {both[0]} and {len(both) - 1} more are trained on too; keep them apart with `where`"
            )
    images = row_images(store, pairs, data.images, side)
    captions = tokenised(pairs.captions, tokenise)
    if entry.label is None:
        return HeldOut(entry.name, pairs, captions, images)
    prompts = matching(store, entry.prompts, ["caption", entry.label]).drop_null()
    classes = sorted(set(prompts[entry.label].to_pylist()))
    labels = _labels(store, pairs, entry.label)
    unknown = sorted({str(label) for label in labels} - set(classes))
    if unknown or not classes:
        raise UserError(f"{where}: no prompt for class {unknown[0]!r}; its prompts name {', '.join(classes) or 'none'}")
    return HeldOut(
        entry.name,
        pairs,
        captions,
        images,
        numbered(labels, classes),
        tokenised(prompts["caption"].to_pylist(), tokenise),
        numbered(prompts[entry.label].to_numpy(zero_copy_only=False), classes),
    )


def _first(pairs: Pairs, limit: int) -> Pairs:
    encoded = pa.array(pairs.caption[:limit]).dictionary_encode()
    captions = pairs.captions.take(encoded.dictionary)
    return Pairs(pairs.rows[:limit], encoded.indices.to_numpy().astype(np.int64), captions, pairs.table.slice(0, limit))


def _labels(store: FeatureStore, pairs: Pairs, label: str) -> NDArray[np.object_]:
    column = store.sample_table(columns=[label])[label].take(pa.array(pairs.rows))
    labels: NDArray[np.object_] = column.to_numpy(zero_copy_only=False)
    return labels


def _same(one: StorePath, other: StorePath) -> bool:
    return one.resolve() == other.resolve()
