"""Resize a picture and keep a part: the bytes of Pillow's `resize` and `crop`, faster with numba (the extra `fast`)."""

from functools import cache, lru_cache
from math import ceil
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ROWS_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
"""Where more than twice as many pixels vanish down as across."""
_LONGEST_COMB = 1 << 22
"""Numbers in the comb that weights are read off: its area grows with the square of a picture's longer side."""


def resize(
    picture: Image.Image, size: tuple[int, int], interpolation: str, part: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """Return uint8 (C, h, w) of the part (left, top, right, bottom) of a picture in mode `L` (C is 1) or `RGB` (3) that
    is resized to this width and height, equal to Pillow's resize and crop. Raises ValueError for a size of no pixel."""
    assert picture.mode in ("L", "RGB"), picture.mode
    kernels, (width, height), (left, top, right, bottom) = compiled_kernels(), picture.size, part
    sides = zip(picture.size, size, strict=True)
    across, down = (_weights(*lengths, interpolation) if kernels else None for lengths in sides)
    try:
        pixels = pa.array(picture) if across and down else None
    except ValueError:  # Pillow keeps more than 16 MB in several pieces
        pixels = None
    if kernels is None or across is None or down is None or pixels is None:
        # Not `resize(box=...)` of the part alone: Pillow keeps the box in float32, which moves the weights.
        values = np.asarray(picture.resize(size, FILTERS[interpolation]).crop(part))
        return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))
    lines = (pixels if picture.mode == "L" else pixels.flatten()).to_numpy().reshape(height, -1)
    columns, rows = [values[left:right] for values in across], [values[top:bottom] for values in down]

    def resize_columns(lines: NDArray[np.uint8]) -> Any:
        if picture.mode == "RGB":
            return kernels.resize_columns(lines, *columns, 3)
        fours = kernels.resize_columns(kernels.in_fours(lines), *columns, 4)
        return fours.transpose(1, 0, 2).reshape(1, -1, right - left)[:, : len(lines)]

    if _ROWS_MAY_BE_FIRST and height - size[1] > max(0, 2 * (width - size[0])):
        return resize_columns(kernels.resize_rows(lines[None], *rows)[0])
    begin, end = int(rows[0][0]), int(rows[0][-1]) + rows[1].shape[1]
    return kernels.resize_rows(resize_columns(lines[begin:end]), rows[0] - begin, rows[1])


@cache
def compiled_kernels() -> ModuleType | None:
    """Return the compiled loops; None without numba, with one that does not know this NumPy, and where there is no
    folder for what is compiled."""
    try:
        from mmkd.base.images import kernels  # noqa: PLC0415 - an extra
    except (ImportError, RuntimeError):
        return None
    return kernels


@lru_cache(64)
def _weights(length: int, target: int, interpolation: str) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
    """Return for each pixel of the target the first source pixel, int64 (n,), and weights from there on, int32 (n, an
    even number): Pillow's own, of 22 bits, read off a comb that it resizes in mode `I`: sums round alike.
    None where the length is below that number, or the comb would be large."""
    scale = length / max(target, 1)
    support = (2 if interpolation == "bicubic" else 1) * max(scale, 1.0)
    taps = ceil(support) * 2
    if taps > length or taps * length > _LONGEST_COMB:
        return None
    teeth = np.tile(np.eye(taps, dtype=np.int32) << 22, -(-length // taps))[:, :length]
    weights = np.asarray(Image.fromarray(teeth).resize((target, taps), FILTERS[interpolation]))
    centers = (np.arange(target) + 0.5) * scale
    firsts = np.clip((centers - support + 0.5).astype(np.int64), 0, length - taps)
    return firsts, weights.T[np.arange(target)[:, None], (firsts[:, None] + np.arange(taps)) % taps]
