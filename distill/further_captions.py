"""Several captions of an image in training: which of them a row has in an epoch, and the row of its features."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from mmkd.base.errors import IncompleteStoreError, UserError
from mmkd.distill.captions import Captions, Tokenize, tokenize_captions
from mmkd.distill.draws import draws
from mmkd.store import FeatureStore
from mmkd.store.samples import in_rows

OWN, UNNAMED = "own", "further"
"""Names of the kinds of a row's own caption, and of further captions without a kind."""
_STREAM = 0x63617074
"""Keeps the draws of captions apart from those of teachers and views."""


@dataclass(frozen=True)
class TrainingCaptions:
    """Choices of n rows, int64 (n,) grid rows, ascending. upto: float64 (m,), place of the row plus the cumulative
    share of the choice. choice_rows: int64 (m,), grid row of each choice's features. choices: int64 (m,), its number
    among the further `captions`, -1 for the row's own. numbers: int64 (u,), of their tokens, as `Captions.numbers`."""

    rows: NDArray[np.int64]
    upto: NDArray[np.float64]
    choice_rows: NDArray[np.int64]
    choices: NDArray[np.int64]
    captions: Captions
    numbers: NDArray[np.int64]

    def choose(self, seed: int, epoch: int, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the grid rows of the captions that these rows have in an epoch, int64 (B,), and their numbers among
        the further captions, -1 for their own: a function of (seed, epoch, row)."""
        places = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        drawn = draws(seed ^ _STREAM, epoch, torch.from_numpy(rows), 1)[:, 0].numpy()
        # The sum may round up to the next row.
        last = np.searchsorted(self.upto, places + 1)
        at = np.minimum(np.searchsorted(self.upto, places + drawn, side="right"), last)
        mine = self.rows[places] == rows
        return np.where(mine, self.choice_rows[at], rows), np.where(mine, self.choices[at], -1)

    def of_rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the further captions that these grid rows may have: the row and the grid row of each, int64 (k,)."""
        places = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        places = places[self.rows[places] == rows]
        first, last = np.searchsorted(self.upto, places, side="right"), np.searchsorted(self.upto, places + 1)
        counts = last + 1 - first
        at = np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)
        further = self.choices[at] >= 0
        return self.rows[np.repeat(places, counts)][further], self.choice_rows[at][further]

    def instead(
        self, chosen: NDArray[np.int64], tokens: torch.Tensor, columns: tuple[int, ...]
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Return tokens int64 (J, L) and columns (J,) of own captions with those of the chosen further ones, int64
        (J,), in their places."""
        others = np.flatnonzero(chosen >= 0)
        tokens[torch.from_numpy(others)] = self.captions.tokens(chosen[others])
        needed = np.array(columns, dtype=np.int64)
        needed[others] = self.captions.columns(chosen[others])
        return tokens, tuple(needed.tolist())


def find_captions(
    store: FeatureStore, rows: NDArray[np.int64], weights: Mapping[str, float] | None, tokenizer: Tokenize
) -> TrainingCaptions | None:
    """Find the captions of rows with a caption, int64 (n,) grid rows, ascending, and draw them by the weights of their
    kinds, None for all alike, if there are any; a row that has none of these kinds keeps its own. Raises UserError if
    the store has no further captions, or not a kind that is named; IncompleteStoreError if they are not extracted
    yet."""
    spans = [span for span in store.record.spans() if span.corpus.towers == ("text",)]
    if not spans or not len(rows):
        if weights is None:
            return None
        raise UserError(f"data.captions: {store.root} has no further captions of the run's images; leave it out")
    columns = ["row", "caption", "caption_kind", "image_rows", "status"]
    table = store.sample_table(columns, reduce(or_, (in_rows(span.rows) for span in spans)))
    if "pending" in table["status"].unique().to_pylist():
        raise IncompleteStoreError(
            f"{store.root}: further captions are not extracted yet; finish `mmkd extract` first, or set data.captions "
            "to {own: 1}"
        )
    table = table.filter(pc.and_(pc.equal(table["status"], "ok"), table["image_rows"].is_valid()))
    kinds = table["caption_kind"].fill_null(UNNAMED).combine_chunks().dictionary_encode()
    names = kinds.dictionary.to_pylist()
    by_kind = dict.fromkeys([OWN, *names], 1.0) if weights is None else weights
    if unknown := sorted(set(by_kind) - {OWN, *names}):
        known = ", ".join([OWN, *names])
        raise UserError(f"data.captions: {store.root} has no captions of kind {unknown[0]!r}; it has {known}")
    share = np.array([by_kind.get(name, 0.0) for name in names])[kinds.indices.to_numpy()]
    parents = pc.list_parent_indices(table["image_rows"]).to_numpy()
    owners = pc.list_flatten(table["image_rows"]).to_numpy()
    places = np.searchsorted(rows, owners).clip(max=len(rows) - 1)
    kept = (rows[places] == owners) & (share[parents] > 0)
    parents, places = parents[kept], places[kept]
    if weights is None and not len(parents):
        return None
    used, choices = np.unique(parents, return_inverse=True)
    # Each row's own caption comes first, at a weight of its own.
    place = np.concatenate([np.arange(len(rows)), places])
    share = np.concatenate([np.full(len(rows), by_kind.get(OWN, 0.0)), share[parents]])
    choice_rows = np.concatenate([rows, table["row"].to_numpy()[parents]])
    choices = np.concatenate([np.full(len(rows), -1), choices])
    total = np.bincount(place, share, len(rows))
    share, total = np.where((choices < 0) & (total[place] == 0), 1.0, share), np.where(total == 0, 1.0, total)
    order = np.lexsort((choice_rows, choices >= 0, place))
    order = order[share[order] > 0]
    place, shares = place[order], share[order] / total[place[order]]
    before = np.cumsum(shares) - shares
    first, last = np.searchsorted(place, place), np.append(place[1:] != place[:-1], True)
    upto = np.where(last, place + 1, place + (before - before[first] + shares))
    captions = tokenize_captions(table["caption"].take(used).to_pylist(), tokenizer)
    return TrainingCaptions(rows, upto, choice_rows[order], choices[order], captions, captions.numbers())
