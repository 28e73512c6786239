"""Resize a picture to several sizes, and keep parts of them: the bytes of Pillow's `resize` and `crop`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, as Pillow's."""


@dataclass(frozen=True)
class Resized:
    """A part of a resized picture."""

    width: int
    height: int
    interpolation: str
    """Key of `FILTERS`."""
    part: Box
    """What is kept of it."""


def resize(picture: Image.Image, wanted: Sequence[Resized]) -> list[NDArray[np.uint8]]:
    """Return uint8 (C, h, w) of each part, C 1 for a picture in mode `L` and 3 for `RGB`, equal to Pillow's resize and
    crop. Raises ValueError for sizes without a pixel."""
    assert picture.mode in ("L", "RGB"), picture.mode
    if any(min(one.width, one.height) < 1 for one in wanted):
        raise ValueError("height and width must be > 0")
    return [
        planes(picture.resize((one.width, one.height), FILTERS[one.interpolation]).crop(one.part)) for one in wanted
    ]


def planes(picture: Image.Image) -> NDArray[np.uint8]:
    """Return uint8 (C, H, W) of an `L` or `RGB` picture."""
    values = np.asarray(picture)
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))
