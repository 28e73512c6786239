"""Resize a picture and keep a part: the bytes of Pillow's `resize` and `crop`, faster with numba (the extra `fast`)."""

from functools import cache, cached_property, lru_cache
from math import ceil
from types import ModuleType

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ROWS_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
"""Where more than twice as many pixels vanish down as across."""
_MOST_WEIGHTS = 1 << 22


class Canvas:
    """A picture in mode `L` or `RGB` that is brought to a mode and laid in the middle of a square of `side`, if that is
    not 0, with margins of `fill`. Source of the margins: github.com/RyanWangZf/MedCLIP, medclip/dataset.py,
    MedCLIPFeatureExtractor.pad_img."""

    def __init__(self, picture: Image.Image, mode: str, side: int = 0, fill: int = 0) -> None:
        assert picture.mode in ("L", "RGB"), picture.mode
        self._given, self.mode, self._fill = picture, mode, fill
        self.size = (side, side) if side else picture.size

    @cached_property
    def picture(self) -> Image.Image:
        """For Pillow."""
        given = self._given if self._given.mode == self.mode else self._given.convert(self.mode)
        if self.size == given.size:
            return given
        square = Image.new(self.mode, self.size, (self._fill,) * len(self.mode))
        square.paste(given, ((self.size[0] - given.width) // 2, (self.size[1] - given.height) // 2))
        return square

    @cached_property
    def lines(self) -> NDArray[np.uint8] | None:
        """For compiled loops: uint8 (H, W) of gray, (H, 4 W) of a color; None without them."""
        kernels = compiled_kernels()
        turns_gray = self._given.mode != self.mode == "L" and self.size == self._given.size
        try:
            pixels = pa.array(self._given if turns_gray else self.picture) if kernels else None
        except ValueError:  # Pillow keeps more than 16 MB in several pieces
            pixels = None
        if kernels is None or pixels is None:
            return None
        flat = pixels.values if turns_gray or self.mode == "RGB" else pixels
        lines: NDArray[np.uint8] = flat.to_numpy().reshape(self.size[1], -1)
        return kernels.gray(lines) if turns_gray else lines


def resize(
    canvas: Canvas, size: tuple[int, int], interpolation: str, part: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """Return uint8 (C, h, w) of the part (left, top, right, bottom) of what lies on a canvas, C 1 in mode `L` and 3 in
    `RGB`, when that is resized to this width and height, equal to Pillow's resize and crop. Raises ValueError for a
    size of no pixel."""
    kernels, lines, (width, height), (left, top, right, bottom) = compiled_kernels(), canvas.lines, canvas.size, part
    sides = zip(canvas.size, size, strict=True)
    across, down = (None if lines is None else _weights(*lengths, interpolation) for lengths in sides)
    if kernels is None or across is None or down is None:
        # Not `resize(box=...)` of the part alone: Pillow keeps the box in float32, which moves the weights.
        values = np.asarray(canvas.picture.resize(size, FILTERS[interpolation]).crop(part))
        return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))
    columns, rows = (values[left:right] for values in across), (values[top:bottom] for values in down)
    rows_first = _ROWS_MAY_BE_FIRST and height - size[1] > max(0, 2 * (width - size[0]))
    resized: NDArray[np.uint8] = kernels.resize(lines, canvas.mode == "RGB", rows_first, *columns, *rows)
    return resized.reshape(-1, bottom - top, right - left)


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
    """Return `kernels.filter_weights`, an even number of them for each pixel; None for a size of no pixel, where the
    length is below that number or the weights would be many, and without compiled loops."""
    kernels, cubic = compiled_kernels(), interpolation == "bicubic"
    taps = 2 * ceil((2 if cubic else 1) * max(length / max(target, 1), 1.0))
    if kernels is None or target < 1 or taps > length or taps * target > _MOST_WEIGHTS:
        return None
    found: tuple[NDArray[np.int64], NDArray[np.int32]] = kernels.filter_weights(length, target, taps, cubic)
    return found
