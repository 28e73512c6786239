"""Source of a run's images: the store's inputs or the corpus."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from mmkd.base.errors import ConfigError, IncompleteStoreError, UserError
from mmkd.base.text import counted
from mmkd.distill.config import DataConfig
from mmkd.distill.device_images import DevicePictures
from mmkd.distill.images import CorpusImages, Pictures, RowImages, StoredImages, WorkerPictures
from mmkd.distill.pairs import Pairs
from mmkd.distill.student import image_side, train_pixels, training_crop
from mmkd.store import FeatureStore
from mmkd.store.inputs import Inputs


def row_images(store: FeatureStore, pairs: Pairs, wanted: Literal["auto", "inputs", "corpus"], side: int) -> RowImages:
    """Return the source of these rows' images. Raises IncompleteStoreError if `inputs` are wanted and some shards have
    none. Raises UserError if `inputs` are wanted and they are smaller than the student's image.

    Args:
        store: whose rows.
        pairs: the rows.
        wanted: `auto` takes the store's inputs when all rows have them in the student's size.
        side: longer side of the student's image, in pixels.
    """
    if wanted == "corpus":
        return CorpusImages(store, pairs)
    inputs = Inputs(store)
    lacking = inputs.lacking(pairs.rows)
    large_enough = inputs.size is not None and inputs.size >= side
    if wanted == "auto" and (lacking or not large_enough):
        return CorpusImages(store, pairs)
    if lacking:
        raise IncompleteStoreError(
            f"{store.root}: no inputs in {counted(len(lacking), 'shard')}, the first is {lacking[0]}; "
            "run `mmkd extract` with --keep-inputs, or set data.images to `corpus`"
        )
    if not large_enough:
        raise UserError(
            f"{store.root} keeps inputs of {inputs.size} pixels, the student sees {side}; "
            "set data.images to `corpus`, or keep larger ones"
        )
    return StoredImages(inputs)


def train_pictures(
    store: FeatureStore, pairs: Pairs, data: DataConfig, student: nn.Module, device: torch.device
) -> Pictures:
    """The pixels that these rows are trained with. Raises ConfigError for `data.decode: device` without inputs in the
    store. Raises IncompleteStoreError, UserError (see `row_images`)."""
    images = row_images(store, pairs, data.images, image_side(student))
    if data.decode == "workers":
        return WorkerPictures(images, train_pixels(student, data.crop_scale))
    if not isinstance(images, StoredImages):
        raise ConfigError(
            "data.decode: device decodes the JPEGs that the store keeps, and these rows are read from the corpus; run "
            f"`mmkd extract` with --keep-inputs {image_side(student)}, or set data.decode to `workers`"
        )
    return DevicePictures(images, training_crop(student, data.crop_scale), device)
