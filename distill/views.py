"""Views in training: which view of an image an epoch meets, its picture, and the row of its features."""

from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image

from mmkd.base.errors import IncompleteStoreError, UserError
from mmkd.base.images.recipe import Recipe, read_recipe
from mmkd.distill.draws import draws
from mmkd.store import FeatureStore
from mmkd.store.samples import in_rows

_STREAM = 0x76696577
"""Keeps the draws of views apart from those of teachers."""


@dataclass(frozen=True)
class TrainingViews:
    """Views of a run's images. images: int64 (n,), grid rows of the images, ascending. rows: int64 (n, V), the grid
    rows of the views of each. keys: of the images' rows."""

    recipe: Recipe
    images: NDArray[np.int64]
    rows: NDArray[np.int64]
    keys: pa.LargeStringArray

    def numbers(self, seed: int, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which view these grid rows have in an epoch, int64 (B,), from 1: a function of (seed, epoch, row)."""
        drawn = draws(seed ^ _STREAM, epoch, torch.from_numpy(rows), 1)[:, 0].numpy()
        return 1 + (drawn * self.recipe.count).astype(np.int64)

    def view_rows(self, seed: int, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the grid rows of these views, int64 (B,); rows without an image stay themselves."""
        places = np.searchsorted(self.images, rows).clip(max=len(self.images) - 1)
        found = self.rows[places, self.numbers(seed, epoch, rows) - 1]
        return np.where(self.images[places] == rows, found, rows)

    def picture(self, image: Image.Image, seed: int, epoch: int, row: int) -> Image.Image:
        """Return the view of a decoded image that this row has in an epoch, as it was extracted."""
        key = self.keys[int(np.searchsorted(self.images, row))].as_py()
        return self.recipe.picture(image, key, int(self.numbers(seed, epoch, np.array([row]))[0]))


def find_views(store: FeatureStore, images: NDArray[np.int64]) -> TrainingViews:
    """Find the views of images, int64 (n,) grid rows, ascending. Raises UserError if the store has none, or not of all
    these images, or of two recipes; IncompleteStoreError if they are not extracted yet."""
    spans = [span for span in store.record.spans() if span.corpus.kind == "views"]
    make = "`mmkd extract ... --views V` makes them"
    if not spans or not len(images):
        what = "has no views" if len(images) else "has no images among the run's rows"
        raise UserError(f"data.views: {store.root} {what}; {make}")
    recipe, *others = (read_recipe(span.corpus.recipe or {}, str(store.root)) for span in spans)
    if any(other != recipe for other in others):
        raise UserError(f"data.views: {store.root} has views of two recipes; choose the rows of one store with one")
    inside = reduce(or_, (in_rows(span.rows) for span in spans))
    table = store.sample_table(["row", "image_rows", "view_number", "status"], inside)
    if "pending" in table["status"].unique().to_pylist():
        raise IncompleteStoreError(f"{store.root}: views are not extracted yet; finish `mmkd extract` first")
    rows = np.full((len(images), recipe.count), -1)
    owner = pc.list_element(table["image_rows"], 0).to_numpy()
    places = np.searchsorted(images, owner).clip(max=len(images) - 1)
    mine = images[places] == owner
    rows[places[mine], table["view_number"].to_numpy()[mine] - 1] = table["row"].to_numpy()[mine]
    if lacking := int((rows < 0).any(axis=1).sum()):
        raise UserError(
            f"data.views: {lacking:,} of the run's {len(images):,} images have no views in {store.root}; {make}"
        )
    keys = store.sample_table(["key"]).take(pa.array(images))["key"].cast(pa.large_string()).combine_chunks()
    return TrainingViews(recipe, images, rows, keys)
