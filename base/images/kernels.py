"""Pillow's resize in compiled loops over many pixels at once; needs numba (the extra `fast`).

The arithmetic is Pillow's own (its `src/libImaging/Resample.c`): weights in float64, normalized, then rounded to fixed
point of 22 bits; columns first, rounded to 8 bits, then rows. So the bytes are equal, and only the order of the loops
differs: here each weight meets a run of neighboring pixels, which fills a vector register.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

PRECISION = 22
"""Bits of a weight's fraction: 32 less 8 of the pixel and 2 for sums beyond its range."""
LANES = 512
"""Pixels that one weight is applied to at a time; their sums and sources stay in the first-level cache."""


Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    try:
        made: Function = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep what was compiled: each process compiles again
        made = njit(nogil=True)(function)
    return made


@_compiled
def weights(length: int, target: int, begin: int, end: int, cubic: bool) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return, for each of the `target`'s pixels from `begin` to `end`, the first of `length` source pixels, int64 (n,),
    and weights in fixed point from there on, int32 (n, taps)."""
    scale = length / target
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    taps = ceil(support) * 2 + 1
    raw = np.empty(taps, dtype=np.float64)
    firsts = np.empty(end - begin, dtype=np.int64)
    # Filled up with zeros to whole steps of `_add_weighted`.
    fixed = np.zeros((end - begin, (taps + 3) // 4 * 4), dtype=np.int32)
    for place in range(begin, end):
        # Columns that only fill up a word are the last one again.
        center = (min(place, target - 1) + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), length) - first
        total = 0.0
        for tap in range(count):
            x = abs((tap + first - center + 0.5) * (1.0 / stretch))
            if not cubic:
                weight = 1.0 - x if x < 1.0 else 0.0
            elif x < 1.0:
                weight = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
            else:
                weight = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0
            raw[tap] = weight
            total += weight
        firsts[place - begin] = first
        for tap in range(count):
            share = raw[tap] / total * (1 << PRECISION)
            fixed[place - begin, tap] = int(share - 0.5) if share < 0 else int(share + 0.5)
    return firsts, fixed


@_compiled
def _add_weighted(
    sums: NDArray[np.int32], source: NDArray[np.uint8], first: int, fixed: NDArray[np.int32], begin: int
) -> None:
    last = source.shape[0] - 1
    end = begin + len(sums)
    sums[:] = 1 << (PRECISION - 1)
    for tap in range(0, len(fixed), 4):
        a, b, c, d = fixed[tap], fixed[tap + 1], fixed[tap + 2], fixed[tap + 3]
        # Weights beyond the last row are zeros: any row serves.
        row_a = source[min(first + tap, last), begin:end]
        row_b = source[min(first + tap + 1, last), begin:end]
        row_c = source[min(first + tap + 2, last), begin:end]
        row_d = source[min(first + tap + 3, last), begin:end]
        for lane in range(len(sums)):
            # One sum of four products: LLVM keeps it in 32 bits.
            sums[lane] += (
                a * np.int32(row_a[lane])
                + b * np.int32(row_b[lane])
                + c * np.int32(row_c[lane])
                + d * np.int32(row_d[lane])
            )
    for lane in range(len(sums)):
        sums[lane] = min(max(sums[lane] >> PRECISION, 0), 255)


@_compiled
def resize_columns(
    source: NDArray[np.uint8],
    firsts: NDArray[np.int64],
    fixed: NDArray[np.int32],
    out: NDArray[np.uint32],
    top: int,
    channels: int,
) -> None:
    """Resize uint8 (W, rows * C), a picture lying on its side, to rows `top` and following of `out`, uint32
    (C, H, w/4): each is four neighboring pixels, the first one lowest. w must be a multiple of 4."""
    rows = source.shape[1] // channels
    sums = np.empty((4, LANES // channels * channels), dtype=np.int32)
    words = np.empty(LANES, dtype=np.uint32)
    for begin in range(0, rows, LANES // channels):
        here = min(LANES // channels, rows - begin)
        lanes = here * channels
        for word in range(len(firsts) // 4):
            for place in range(4):
                taps = fixed[4 * word + place]
                _add_weighted(sums[place, :lanes], source, firsts[4 * word + place], taps, begin * channels)
            # Written one by one, bytes cost more than their sums.
            for lane in range(lanes):
                words[lane] = sums[0, lane] | sums[1, lane] << 8 | sums[2, lane] << 16 | sums[3, lane] << 24
            for channel in range(channels):
                for row in range(here):
                    out[channel, top + begin + row, word] = words[row * channels + channel]


@_compiled
def resize_rows(
    source: NDArray[np.uint8], firsts: NDArray[np.int64], fixed: NDArray[np.int32], out: NDArray[np.uint8]
) -> None:
    """Resize uint8 (C, H, w) to `out`, uint8 (C, h, w)."""
    sums = np.empty(source.shape[2], dtype=np.int32)
    for channel in range(source.shape[0]):
        for place in range(len(firsts)):
            _add_weighted(sums, source[channel], firsts[place], fixed[place], 0)
            line = out[channel, place]
            for lane in range(len(sums)):
                line[lane] = sums[lane]
