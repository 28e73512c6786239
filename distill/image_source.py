"""Which images a run reads: those that the store keeps, or the corpus' own."""

from __future__ import annotations

from typing import Literal

from mmkd.distill.images import CorpusImages, RowImages, StoredImages
from mmkd.distill.pairs import Pairs
from mmkd.store import FeatureStore
from mmkd.store.errors import IncompleteStoreError, UserError
from mmkd.store.inputs import Inputs


def row_images(store: FeatureStore, pairs: Pairs, wanted: Literal["auto", "inputs", "corpus"], side: int) -> RowImages:
    """Where the images of these rows are read from.

    Args:
        store: whose rows.
        pairs: the rows.
        wanted: `auto` takes the store's inputs when all rows have them in the student's size.
        side: longer side of the student's image, in pixels.

    Raises:
        IncompleteStoreError: `inputs` are wanted and some shards have none.
        UserError: `inputs` are wanted and they are smaller than the student's image.
    """
    if wanted == "corpus":
        return CorpusImages(store, pairs)
    inputs = Inputs(store.root, store.record)
    lacking = inputs.lacking(pairs.rows)
    large_enough = inputs.size is not None and inputs.size >= side
    if wanted == "auto" and (lacking or not large_enough):
        return CorpusImages(store, pairs)
    if lacking:
        raise IncompleteStoreError(
            f"{store.root}: {len(lacking)} shards have no inputs, the first is {lacking[0]}; run `mmkd extract` with "
            f"--keep-inputs, or set data.images to `corpus`"
        )
    if not large_enough:
        raise UserError(
            f"{store.root} keeps inputs of {inputs.size} pixels, the student sees {side}; "
            "set data.images to `corpus`, or keep larger ones"
        )
    return StoredImages(inputs)
