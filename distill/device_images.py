"""Pixels of rows decoded and cropped where the training runs: worker processes only read bytes and draw crops. On CUDA
the decoder is nvJPEG, on a CPU libjpeg-turbo (torchvision.io). Crops are those that a worker would draw; their pixels
are not quite, as another resize rounds otherwise: which of the two a run uses is part of what it learns."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from mmkd.base.errors import UserError
from mmkd.base.images.source import ImageError
from mmkd.distill.images import StoredImages, Wanted, drawn, gone


@dataclass(frozen=True)
class _Encoded:
    """A row's JPEG uint8 (bytes,), and the part that is kept: top, left, height, width in pixels."""

    row: int
    data: torch.Tensor
    place: tuple[int, int, int, int]


class _Files(Dataset[_Encoded | UserError]):
    def __init__(self, images: StoredImages, crop: RandomResizedCrop, seed: int) -> None:
        self.images, self.crop, self.seed = images, crop, seed

    def __getitem__(self, item: tuple[int, int]) -> _Encoded | UserError:
        epoch, row = item
        try:
            data = self.images.read(row)
            header = Image.open(io.BytesIO(data), formats=("JPEG",))
        except (ImageError, OSError) as error:
            return gone(self.images, row, error)
        with drawn(self.seed, epoch, row):
            place = self.crop.get_params(header, list(self.crop.scale), list(self.crop.ratio))
        return _Encoded(row, torch.frombuffer(bytearray(data), dtype=torch.uint8), place)


@dataclass(frozen=True)
class DevicePictures:
    """The store's own JPEGs, decoded and cropped on `device`."""

    images: StoredImages
    crop: RandomResizedCrop
    device: torch.device

    def batches(self, wanted: Wanted, seed: int, workers: int) -> Iterator[torch.Tensor]:
        """As `WorkerPictures.batches`, on the device. Raises UserError if a JPEG is not in the inputs, or cannot be
        decoded on this device."""
        loader = DataLoader(
            _Files(self.images, self.crop, seed),
            batch_sampler=([(epoch, row) for row in rows.tolist()] for epoch, rows in wanted),
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),
        )
        return (self._pixels(batch) for batch in iter(loader))

    def _pixels(self, batch: list[_Encoded | UserError]) -> torch.Tensor:
        for found in batch:
            if isinstance(found, UserError):
                raise found
        files = [found for found in batch if isinstance(found, _Encoded)]
        try:
            pictures = decode_jpeg([file.data for file in files], mode=ImageReadMode.RGB, device=self.device)
        except RuntimeError as error:
            rows = ", ".join(str(file.row) for file in files[:5])
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"a picture of rows {rows}, ... cannot be decoded on {self.device}: {reason}; "
                "look at the store with `mmkd store verify`, or set data.decode to `workers`"
            ) from error
        size = list(self.crop.size)
        return torch.stack(
            [
                resized_crop(picture, *file.place, size, self.crop.interpolation, antialias=True)
                for picture, file in zip(pictures, files, strict=True)
            ]
        )
