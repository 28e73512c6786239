"""Held-out sets of a run, read from their stores and held against the rows that are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmkd.base.errors import ConfigError, UserError
from mmkd.base.places.remote import StorePath
from mmkd.distill.captions import tokenised
from mmkd.distill.config import DataConfig, MonitorSet
from mmkd.distill.image_source import row_images
from mmkd.distill.monitor import HeldOut, numbered
from mmkd.distill.pairs import Pairs, find_pairs, matching
from mmkd.distill.student import Tokenise
from mmkd.store import FeatureStore


@dataclass(frozen=True)
class HeldOutRows:
    """The rows of one monitor set, found before any network is built: what is wrong with them is said at once.

    labels: the class of each pair, empty for retrieval. prompts: captions and classes of the prompts.
    """

    name: str
    store: FeatureStore
    pairs: Pairs
    labels: list[str]
    prompts: pa.Table | None

    def ready(self, data: DataConfig, side: int, tokenise: Tokenise) -> HeldOut:
        """The set with its tokens and its images.

        Args:
            data: where images come from.
            side: of the student's image, in pixels.
            tokenise: the student's tokenizer.
        """
        images = row_images(self.store, self.pairs, data.images, side)
        captions = tokenised(self.pairs.captions, tokenise)
        if self.prompts is None:
            return HeldOut(self.name, self.pairs, captions, images)
        classes = sorted(set(self.prompts["class"].to_pylist()))
        prompts = tokenised(self.prompts["caption"].to_pylist(), tokenise)
        prompt_labels = numbered(self.prompts["class"].to_pylist(), classes)
        return HeldOut(self.name, self.pairs, captions, images, numbered(self.labels, classes), prompts, prompt_labels)


def held_out_rows(entry: MonitorSet, run_store: FeatureStore, training: Pairs) -> HeldOutRows:
    """The rows of one monitor set, held against those that are trained on.

    Args:
        entry: what the configuration says.
        run_store: the store that is trained on.
        training: its rows that are trained on.

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
    if entry.label is None:
        return HeldOutRows(entry.name, store, pairs, [], None)
    prompts = matching(store, entry.prompts, ["caption", entry.label]).drop_null()
    classes = sorted(set(prompts[entry.label].to_pylist()))
    labels = store.sample_table(columns=[entry.label])[entry.label].take(pa.array(pairs.rows)).to_pylist()
    unknown = sorted({str(label) for label in labels} - set(classes))
    if unknown or not classes:
        raise UserError(f"{where}: no prompt for class {unknown[0]!r}; its prompts name {', '.join(classes) or 'none'}")
    return HeldOutRows(entry.name, store, pairs, labels, prompts.rename_columns(["caption", "class"]))


def _first(pairs: Pairs, limit: int) -> Pairs:
    encoded = pa.array(pairs.caption[:limit]).dictionary_encode()
    captions = pairs.captions.take(encoded.dictionary)
    numbers = encoded.indices.to_numpy().astype(np.int64)
    return Pairs(pairs.rows[:limit], numbers, pairs.image[:limit], captions, pairs.table.slice(0, limit))


def _same(one: StorePath, other: StorePath) -> bool:
    return one.resolve() == other.resolve()
