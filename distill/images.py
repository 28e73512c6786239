"""Images of rows: where their bytes are, and their pixels in an order that the caller gives. Worker processes decode
and crop; or they only read bytes and draw crops, and the training device decodes (nvJPEG on CUDA, libjpeg-turbo on a
CPU). Both draw the same crops; pixels differ by a level or two, as another resize rounds otherwise."""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from mmkd.base.errors import ConfigError, IncompleteStoreError, MmkdError, UserError, cause
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError, ImageSource
from mmkd.base.images.uri import image_source
from mmkd.base.places.remote import RemotePath
from mmkd.base.text import counted
from mmkd.distill.config import DataConfig
from mmkd.distill.image_places import ImagePlaces
from mmkd.distill.student import image_size, student_pixels
from mmkd.distill.views import TrainingViews
from mmkd.store import FeatureStore
from mmkd.store.inputs import Inputs, inputs_file

Wanted = Iterable[tuple[int, NDArray[np.int64]]]
"""Epoch and rows int64 (B,) of each batch."""
Pictures = Callable[[Wanted, int, int], Iterator[torch.Tensor]]
"""Wanted batches, seed and number of worker processes, which start at the call, to uint8 (B, 3, H, W) of each batch."""
Pixels = Callable[[Image.Image], torch.Tensor]
"""A picture to uint8 (3, H, W)."""
Crop = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


class CorpusImages:
    """The original files, as the sample table names them."""

    def __init__(self, store: FeatureStore, places: ImagePlaces) -> None:
        self.places, self.root = places, store.record.image_root
        self.forked = not isinstance(store.root, RemotePath)

    def _source(self, row: int) -> ImageSource:
        return image_source(self.root(row), *self.places[row])

    def read(self, row: int) -> bytes:
        """Return the encoded bytes of a row's image, as they were extracted. Raises ImageError if they are gone."""
        return self._source(row).read()

    def name(self, row: int) -> str:
        """Return the path of the file, or of the archive that holds it."""
        return str(self._source(row).place)


class StoredImages:
    """The JPEGs that the store keeps."""

    forked = True

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def read(self, row: int) -> bytes:
        """Return a row's JPEG. Raises ImageError if there is none."""
        found = self.inputs.jpeg(row)
        if found is None:
            raise ImageError("not in the inputs")
        return bytes(found)

    def name(self, row: int) -> str:
        """Return the shard's file."""
        return str(self.inputs.root / inputs_file(row // self.inputs.rows_per_shard))


RowImages = CorpusImages | StoredImages


def row_images(
    store: FeatureStore, places: ImagePlaces, wanted: Literal["auto", "inputs", "corpus"], side: int
) -> RowImages:
    """Find the images of these rows. `auto` takes the store's inputs when all rows have them in the student's size;
    `side` is the longer side of the student's image, in pixels. Raises IncompleteStoreError if `inputs` are wanted and
    shards have none; UserError if they are smaller than `side`."""
    if wanted == "corpus":
        return CorpusImages(store, places)
    inputs = Inputs(store)
    lacking = inputs.lacking(places.rows)
    if lacking:
        lacking = inputs.lacking(places.rows[places.uri_starts[1:] > places.uri_starts[:-1]])
    large_enough = inputs.size is not None and inputs.size >= side
    if wanted == "auto" and (lacking or not large_enough):
        return CorpusImages(store, places)
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
    images: RowImages, data: DataConfig, student: nn.Module, device: torch.device, views: TrainingViews | None
) -> Pictures:
    """Return the source of the pixels that rows are trained with: crops, or views. Raises ConfigError for
    `data.decode: device` without inputs in the store."""
    if views is not None:
        return partial(image_batches, images, student_pixels(student), views=views)
    if data.decode == "workers":
        return partial(image_batches, images, student_pixels(student, data.crop_scale))
    if not isinstance(images, StoredImages):
        raise ConfigError(
            "data.decode: device decodes the JPEGs that the store keeps, and these rows are read from the corpus; run "
            f"`mmkd extract` with --keep-inputs {max(image_size(student))}, or set data.decode to `workers`"
        )
    crop: RandomResizedCrop = student_pixels(student, data.crop_scale).transforms[0]
    return partial(_device_batches, images, crop, device)


class _Rows(Dataset[Any]):
    """`make(epoch, row, bytes)` of each (epoch, row), with random numbers that are a function of (seed, epoch, row)
    alone. Errors are returned, as a worker would wrap them in its traceback."""

    def __init__(self, images: RowImages, make: Callable[[int, int, bytes], Any], seed: int) -> None:
        self.images, self.make, self.seed = images, make, seed

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, row = item
        state = int(np.random.SeedSequence([self.seed, epoch, row]).generate_state(1, np.uint64)[0])
        try:
            data = self.images.read(row)
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: it also queues a call for CUDA, with a traceback, for every image.
                torch.default_generator.manual_seed(state)
                return self.make(epoch, row, data)
        except MmkdError as error:
            return error
        except (ImageError, OSError) as error:
            return UserError(
                f"image of row {row}, {self.images.name(row)}: {error}; it was sound when extracted: bring it back, "
                "note where the images lie now (mmkd store relocate), or train from `inputs` (mmkd extract "
                "--keep-inputs)"
            )


def _load(
    rows: _Rows, collate: Callable[[list[Any]], Any], wanted: Wanted, workers: int, *, pin: bool
) -> Iterator[Any]:
    """Start the workers, and return their collated batches. Raises UserError, on iteration, if an image is gone; and
    what `read` raises."""
    loader = DataLoader(
        rows,
        batch_sampler=([(epoch, row) for row in numbers.tolist()] for epoch, numbers in wanted),
        num_workers=workers,
        collate_fn=partial(_collate, collate),
        generator=torch.Generator(),  # it draws a seed, from a generator that nobody else counts on
        pin_memory=pin,
        # A forked process lacks the threads by which this one has asked a server, and would wait for them forever.
        multiprocessing_context=None if rows.images.forked or not workers else "spawn",
    )
    return map(_sound, iter(loader))


def _collate(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, MmkdError)), None) or collate(items)


def _sound(batch: Any) -> Any:
    if isinstance(batch, MmkdError):
        raise batch
    return batch


def image_batches(
    images: RowImages, pixels: Pixels, wanted: Wanted, seed: int, workers: int, *, views: TrainingViews | None = None
) -> Iterator[torch.Tensor]:
    """Yield uint8 (B, 3, H, W) for each (epoch, rows) of `wanted`, of the image or of its view, decoded in `workers`
    processes that start at this call. Raises UserError if an image is gone or damaged; the message names row and
    file."""
    rows = _Rows(images, partial(_decode, pixels, views, seed), seed)
    return _load(rows, _stack, wanted, workers, pin=torch.cuda.is_available())


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)


def _decode(pixels: Pixels, views: TrainingViews | None, seed: int, epoch: int, row: int, data: bytes) -> torch.Tensor:
    picture = decode(data)
    return pixels(picture if views is None else views.picture(picture, seed, epoch, row))


def _device_batches(
    images: StoredImages, crop: RandomResizedCrop, device: torch.device, wanted: Wanted, seed: int, workers: int
) -> Iterator[torch.Tensor]:
    """As `image_batches`, decoded and cropped on `device`. Also raises UserError if a JPEG cannot be decoded there."""
    files = _load(_Rows(images, partial(_draw_crop, crop), seed), list, wanted, workers, pin=False)
    return map(partial(_decode_on, device, crop), files)


def _draw_crop(crop: RandomResizedCrop, _epoch: int, row: int, data: bytes) -> tuple[int, torch.Tensor, Crop]:
    """Return the row, its JPEG as uint8 (bytes,), and the part of it that is kept."""
    header = Image.open(io.BytesIO(data), formats=("JPEG",))
    place = crop.get_params(header, list(crop.scale), list(crop.ratio))
    return row, torch.frombuffer(bytearray(data), dtype=torch.uint8), place


def _decode_on(
    device: torch.device, crop: RandomResizedCrop, files: list[tuple[int, torch.Tensor, Crop]]
) -> torch.Tensor:
    try:
        pictures = decode_jpeg([data for _, data, _ in files], mode=ImageReadMode.RGB, device=device) if files else []
    except RuntimeError as error:
        rows = ", ".join(str(row) for row, _, _ in files[:5])
        raise UserError(
            f"a picture of rows {rows}, ... cannot be decoded on {device}: {cause(error, 120)}; "
            "look at the store with `mmkd store verify`, or set data.decode to `workers`"
        ) from error
    size = list(crop.size)
    parts = zip(pictures, (place for _, _, place in files), strict=True)
    return _stack([resized_crop(part, *place, size, crop.interpolation, antialias=True) for part, place in parts])
