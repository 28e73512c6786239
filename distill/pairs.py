"""Images and captions of the training rows, read from the original corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmkd.distill.config import RunConfig
from mmkd.distill.order import Schedule, batch_rows, epoch_order
from mmkd.store import FeatureStore
from mmkd.store.errors import IncompleteStoreError, UserError
from mmkd.store.images import ImageError, decode
from mmkd.store.sources import image_source

Augment = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class TrainingPairs:
    """Which rows are trained on, their caption tokens, and where their images are.

    rows: int64 (n,) grid rows. tokens: int64 (u, L) of distinct captions. group: int64 (N,), row to caption
    number (-1 elsewhere): equal captions have equal numbers.
    """

    rows: NDArray[np.int64]
    tokens: torch.Tensor
    group: NDArray[np.int64]
    table: pa.Table
    root: Callable[[int], str]
    """Grid row to the folder that its `uri` is relative to: a store may hold several corpora."""


def training_pairs(
    store: FeatureStore, config: RunConfig, available: NDArray[np.bool_], tokenise: Callable[[list[str]], torch.Tensor]
) -> TrainingPairs:
    """Pick the rows with a sound image, a sound caption and at least one teacher, and tokenise each caption once.

    Raises:
        UserError: `where` names a column or value that is not there, or fewer rows than a batch are left.
        IncompleteStoreError: rows that match have not been extracted yet.
    """
    condition = None
    for column, value in config.where.items():
        store.sample_table(columns=[column], filter=pads.field(column) == value)  # names the columns when it is wrong
        term = pads.field(column) == value
        condition = term if condition is None else condition & term
    table = store.sample_table(columns=["row", "caption", "uri", "offset", "length", "status"], filter=condition)
    status = table["status"].to_numpy(zero_copy_only=False)
    pending = int(np.count_nonzero(status == "pending"))
    if pending:
        raise IncompleteStoreError(
            f"{store.root}: {pending} of {len(table)} matching rows are not extracted yet; finish `mmkd extract` first"
        )
    matching = table["row"].to_numpy()
    has_image = np.array(table["uri"].is_valid())
    usable = (status == "ok") & has_image & available[matching].any(axis=1)
    table = table.filter(pa.array(usable))
    rows = table["row"].to_numpy()
    if len(rows) < config.batch_size:
        raise UserError(
            f"{store.root}: {len(rows)} rows match {config.where or 'everything'} and have a teacher, "
            f"fewer than one batch of {config.batch_size}; lower batch_size or change `where`"
        )
    encoded = table["caption"].combine_chunks().dictionary_encode()
    group = np.full(len(store), -1, dtype=np.int64)
    group[rows] = encoded.indices.to_numpy()
    return TrainingPairs(rows, tokenise(encoded.dictionary.to_pylist()), group, table, store.record.image_root)


@dataclass(frozen=True)
class ImageBatch:
    """One step's rows int64 (B,) and their augmented images float32 (B, 3, H, W)."""

    rows: NDArray[np.int64]
    images: torch.Tensor


class _Images(Dataset[torch.Tensor | UserError]):
    """Augmented image of a row. Which crop a row gets is a function of (seed, epoch, row) alone."""

    def __init__(self, pairs: TrainingPairs, augment: Augment, seed: int, epoch: int) -> None:
        self.place = {row: index for index, row in enumerate(pairs.rows.tolist())}
        # Arrow columns, not Python lists: worker processes share their pages.
        self.uri, self.offset, self.length = (pairs.table[name] for name in ("uri", "offset", "length"))
        self.root, self.augment, self.seed, self.epoch = pairs.root, augment, seed, epoch

    def __getitem__(self, row: int) -> torch.Tensor | UserError:
        index = self.place[row]
        source = image_source(
            self.root(row), self.uri[index].as_py(), self.offset[index].as_py(), self.length[index].as_py()
        )
        try:
            picture = decode(source.read())
        except ImageError as error:
            # Returned, not raised: a worker process would wrap it in its traceback.
            return UserError(f"image of row {row}, {source.path}: {error}; it was sound when extracted")
        seed = int(np.random.SeedSequence([self.seed, self.epoch, row]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it also queues a call for CUDA, with a traceback, for every image.
            torch.default_generator.manual_seed(seed)
            return self.augment(picture)


def _stack(images: list[torch.Tensor | UserError]) -> torch.Tensor | UserError:
    """float32 (B, 3, H, W), or the first error of the batch."""
    sound = [image for image in images if isinstance(image, torch.Tensor)]
    return torch.stack(sound) if len(sound) == len(images) else next(e for e in images if isinstance(e, UserError))


def image_batches(
    pairs: TrainingPairs, config: RunConfig, augment: Augment, schedule: Schedule, first_step: int
) -> Iterator[ImageBatch]:
    """Yield the batches from `first_step` to the end of the run, decoded in worker processes."""
    epoch, skip = schedule.place(first_step)
    while epoch < schedule.epochs:
        order = epoch_order(pairs.rows, config.seed, epoch)
        batches = [batch_rows(order, number, schedule.batch_size) for number in range(skip, schedule.steps_per_epoch)]
        loader = DataLoader(
            _Images(pairs, augment, config.seed, epoch),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=config.loader_workers,
            collate_fn=_stack,
        )
        for rows, images in zip(batches, loader, strict=True):
            if isinstance(images, UserError):
                raise images
            yield ImageBatch(rows, images)
        epoch, skip = epoch + 1, 0
