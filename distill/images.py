"""Pixels of rows, decoded in worker processes, in an order that the caller gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mmkd.base.errors import UserError
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError, ImageSource
from mmkd.base.images.uri import image_source
from mmkd.distill.pairs import Pairs
from mmkd.distill.student import Pixels
from mmkd.store import FeatureStore
from mmkd.store.inputs import Inputs, inputs_file

Wanted = Iterable[tuple[int, NDArray[np.int64]]]
"""Epoch and rows int64 (B,) of one batch after another."""


class RowImages(Protocol):
    """Source of the rows' encoded images."""

    def read(self, row: int) -> bytes:
        """The encoded bytes of one row's image; ImageError when they are gone."""

    def name(self, row: int) -> str:
        """The file, for a complaint."""


class CorpusImages:
    """The original files, as the sample table names them."""

    def __init__(self, store: FeatureStore, pairs: Pairs) -> None:
        # Arrow columns, not Python lists: worker processes share their pages.
        self.uri, self.offset, self.length = (pairs.table[name] for name in ("uri", "offset", "length"))
        self.rows, self.root = pairs.rows, store.record.image_root

    def _source(self, row: int) -> ImageSource:
        index = int(np.searchsorted(self.rows, row))
        return image_source(
            self.root(row), self.uri[index].as_py(), self.offset[index].as_py(), self.length[index].as_py()
        )

    def read(self, row: int) -> bytes:
        """The bytes as they were extracted."""
        return self._source(row).read()

    def name(self, row: int) -> str:
        """Path of the file, or of the archive that holds it."""
        return str(self._source(row).path)


class StoredImages:
    """The JPEGs that the store keeps."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def read(self, row: int) -> bytes:
        """One row's JPEG."""
        found = self.inputs.jpeg(row)
        if found is None:
            raise ImageError("not in the inputs")
        return bytes(found)

    def name(self, row: int) -> str:
        """The shard's file."""
        return str(self.inputs.root / inputs_file(row // self.inputs.rows_per_shard))


@contextmanager
def drawn(seed: int, epoch: int, row: int) -> Iterator[None]:
    """Seed the generators from these three numbers inside the block, and restore them after it."""
    state = int(np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it also queues a call for CUDA, with a traceback, for every image.
        torch.default_generator.manual_seed(state)
        yield


def gone(images: RowImages, row: int, reason: Exception) -> UserError:
    """The complaint about an image. Returned by workers, not raised: they would wrap it in their traceback."""
    return UserError(
        f"image of row {row}, {images.name(row)}: {reason}; it was sound when extracted: bring it back, note where "
        "the images lie now (mmkd store relocate), or train from `inputs` (mmkd extract --keep-inputs)"
    )


class _Images(Dataset[torch.Tensor | UserError]):
    """Pixels of (epoch, row). Which crop a row gets is a function of (seed, epoch, row) alone."""

    def __init__(self, images: RowImages, pixels: Pixels, seed: int) -> None:
        self.images, self.pixels, self.seed = images, pixels, seed

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor | UserError:
        epoch, row = item
        try:
            picture = decode(self.images.read(row))
        except ImageError as error:
            return gone(self.images, row, error)
        with drawn(self.seed, epoch, row):
            return self.pixels(picture)


def _stack(images: list[torch.Tensor | UserError]) -> torch.Tensor | UserError:
    """uint8 (B, 3, H, W), or the first error of the batch."""
    sound = [image for image in images if isinstance(image, torch.Tensor)]
    return torch.stack(sound) if len(sound) == len(images) else next(e for e in images if isinstance(e, UserError))


class Pictures(Protocol):
    """Source of a run's pixels."""

    def batches(self, wanted: Wanted, seed: int, workers: int) -> Iterator[torch.Tensor]:
        """Uint8 (B, 3, H, W) for each (epoch, rows) of `wanted`; worker processes start at this call."""


@dataclass(frozen=True)
class WorkerPictures:
    """Images decoded and cropped in worker processes."""

    images: RowImages
    pixels: Pixels

    def batches(self, wanted: Wanted, seed: int, workers: int) -> Iterator[torch.Tensor]:
        """See `image_batches`."""
        return image_batches(self.images, self.pixels, wanted, seed, workers)


def image_batches(images: RowImages, pixels: Pixels, wanted: Wanted, seed: int, workers: int) -> Iterator[torch.Tensor]:
    """Uint8 (B, 3, H, W) for each (epoch, rows) of `wanted`, decoded in `workers` processes that start at this call.
    Raises UserError if an image is gone or damaged; the message names row and file."""
    loader = DataLoader(
        _Images(images, pixels, seed),
        batch_sampler=([(epoch, row) for row in rows.tolist()] for epoch, rows in wanted),
        num_workers=workers,
        collate_fn=_stack,
        generator=torch.Generator(),  # it draws a seed, from a generator that nobody else counts on
        pin_memory=torch.cuda.is_available(),
    )
    return _sound(iter(loader))


def _sound(batches: Iterator[torch.Tensor | UserError]) -> Iterator[torch.Tensor]:
    for stacked in batches:
        if isinstance(stacked, UserError):
            raise stacked
        yield stacked
