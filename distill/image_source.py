"""Which images a run reads: those that the store keeps, or the corpus' own."""

from __future__ import annotations

from typing import Literal

from mmkd.distill.images import CorpusImages, RowImages
from mmkd.distill.pairs import Pairs
from mmkd.store import FeatureStore


def row_images(store: FeatureStore, pairs: Pairs, wanted: Literal["auto", "inputs", "corpus"], side: int) -> RowImages:
    """Where the images of these rows are read from."""
    return CorpusImages(store, pairs)
