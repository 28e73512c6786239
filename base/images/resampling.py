"""Resize a picture to several sizes at once, computing only the parts that are kept. The bytes are those of Pillow's
`resize` in any case: with numba (the extra `fast`) several times faster, without it by Pillow itself."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_BAND = 128
"""Source rows that are laid on their side at a time: a band of 1,000 columns fits into a second-level cache."""

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
    kernels = compiled_kernels()
    return _resize_with_pillow(picture, wanted) if kernels is None else _resize_in_bands(kernels, picture, wanted)


@cache
def compiled_kernels() -> ModuleType | None:
    """Return the module of compiled loops; None without numba, and where Pillow's compiler may have fused float64
    multiplications with additions, as on ARM: a weight could then differ in its last bit."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        from mmkd.base.images import kernels  # noqa: PLC0415 - an extra
    except ImportError:
        return None
    return kernels


def _resize_with_pillow(picture: Image.Image, wanted: Sequence[Resized]) -> list[NDArray[np.uint8]]:
    # Not `resize(box=...)` of the part alone: Pillow keeps the box in float32, which moves the weights.
    return [
        planes(picture.resize((one.width, one.height), FILTERS[one.interpolation]).crop(one.part)) for one in wanted
    ]


def _resize_in_bands(kernels: ModuleType, picture: Image.Image, wanted: Sequence[Resized]) -> list[NDArray[np.uint8]]:
    channels = len(picture.getbands())
    plans = []
    for one in wanted:
        left, top, right, bottom = one.part
        cubic = one.interpolation == "bicubic"
        # Columns come in fours; those beyond the picture are cut off at the end.
        columns = kernels.weights(picture.width, one.width, left, right + (left - right) % 4, cubic)
        rows = kernels.weights(picture.height, one.height, top, bottom, cubic)
        plans.append((columns, rows, np.empty((channels, picture.height, len(columns[0]) // 4), dtype=np.uint32)))
    # What no weight meets is not looked at.
    left, right = _met([columns for columns, _, _ in plans], picture.width)
    begin, end = _met([rows for _, rows, _ in plans], picture.height)
    for top in range(begin, end, _BAND):
        band = picture.crop((left, top, right, min(top + _BAND, end)))
        turned = np.asarray(band.transpose(Image.Transpose.TRANSPOSE)).reshape(right - left, -1)
        for (firsts, fixed), _, narrow in plans:
            kernels.resize_columns(turned, firsts - left, fixed, narrow, top, channels)
    found = []
    for one, (_, (firsts, fixed), narrow) in zip(wanted, plans, strict=True):
        source = narrow.view(np.uint8)
        out = np.empty((channels, len(firsts), source.shape[2]), dtype=np.uint8)
        kernels.resize_rows(source, firsts, fixed, out)
        found.append(np.ascontiguousarray(out[:, :, : one.part[2] - one.part[0]]))
    return found


def _met(weights: Sequence[tuple[NDArray[np.int64], NDArray[np.int32]]], length: int) -> tuple[int, int]:
    """Return begin and end of the source pixels that any of the weights meet."""
    ends = [int(firsts[-1]) + fixed.shape[1] for firsts, fixed in weights]
    return min(int(firsts[0]) for firsts, _ in weights), min(max(ends), length)


def planes(picture: Image.Image) -> NDArray[np.uint8]:
    """Return uint8 (C, H, W) of an `L` or `RGB` picture."""
    values = np.asarray(picture)
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))
