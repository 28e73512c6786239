"""Both passes of Pillow's resize in compiled loops: sums in 32 bits, rounded to a byte, as in libImaging/Resample.c,
but eight products at a time: across, those of two neighboring pixels; down, of neighbors in a row. Needs numba."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

PRECISION = 22
"""Bits of a weight's fraction: 32 less 8 of the pixel and 2 for sums beyond its range."""
_HALF = 1 << (PRECISION - 1)
_BYTE, _NUMBER, _SIZE = (ir.IntType(bits) for bits in (8, 32, 64))


def _vector(values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_NUMBER, len(values)), [ir.Constant(_NUMBER, value) for value in values])


@intrinsic
def _weighted(context: Any, pixels: Any, pixel: Any, weights: Any, weight: Any, steps: Any) -> Any:
    """Four bytes as one uint32, the first lowest: sums of every fourth product of the bytes from `pixel` on and the
    weights from `weight` on, eight a step. Of a plain loop numba would make no vectors."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        def load(argument: int, kind: Any, done: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, given[argument])
            address = builder.gep(array.data, [builder.add(given[argument + 1], done)])
            return builder.load(builder.bitcast(address, ir.VectorType(kind, 8).as_pointer()), align=1)

        sums = cgutils.alloca_once_value(builder, _vector([_HALF] * 4 + [0] * 4))
        with cgutils.for_range(builder, given[4], intp=_SIZE) as loop:
            done = builder.mul(loop.index, ir.Constant(_SIZE, 8))
            wide = builder.zext(load(0, _BYTE, done), ir.VectorType(_NUMBER, 8))
            builder.store(builder.add(builder.load(sums), builder.mul(wide, load(2, _NUMBER, done))), sums)
        both = builder.load(sums)
        halves = [builder.shuffle_vector(both, both, _vector(list(range(begin, begin + 4)))) for begin in (0, 4)]
        total = builder.ashr(builder.add(*halves), _vector([PRECISION] * 4))
        for beyond, limit in (("<", _vector([0] * 4)), (">", _vector([255] * 4))):
            total = builder.select(builder.icmp_signed(beyond, total, limit), limit, total)
        return builder.bitcast(builder.trunc(total, ir.VectorType(_BYTE, 4)), _NUMBER)

    return types.uint32(pixels, types.intp, weights, types.intp, types.intp), generate


@njit(nogil=True, cache=True)
def resize_columns(
    pixels: NDArray[np.uint8], firsts: NDArray[np.int64], weights: NDArray[np.int32], channels: int
) -> NDArray[np.uint8]:
    """Return uint8 (channels, H, w) of (H, 4 W), four bytes a pixel: column i is the sum of the pixels from `firsts[i]`
    on with int32 `weights[i]`, (w, an even number)."""
    width, taps = weights.shape
    each = np.repeat(weights, 4)  # one for each byte
    out = np.empty((channels, len(pixels), width), dtype=np.uint8)
    words = np.empty(width, dtype=np.uint32)
    for row in range(len(pixels)):
        for place in range(width):
            begin = row * pixels.shape[1] + 4 * firsts[place]
            words[place] = _weighted(pixels, begin, each, place * taps * 4, taps // 2)
        for channel in range(channels):
            line = out[channel, row]
            for place in range(width):
                line[place] = words[place] >> (8 * channel) & 255
    return out


@njit(nogil=True, cache=True)
def resize_rows(planes: NDArray[np.uint8], firsts: NDArray[np.int64], weights: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return uint8 (C, h, n) of (C, H, n); the weights as for columns."""
    out = np.empty((len(planes), len(firsts), planes.shape[2]), dtype=np.uint8)
    sums = np.empty(planes.shape[2], dtype=np.int32)
    for channel in range(len(planes)):
        for place in range(len(firsts)):
            sums[:] = _HALF
            for tap in range(0, weights.shape[1], 2):
                row, upper, lower = firsts[place] + tap, weights[place, tap], weights[place, tap + 1]
                above, below = planes[channel, row], planes[channel, row + 1]
                for lane in range(len(sums)):
                    # One sum of both products: LLVM keeps it in 32 bits.
                    sums[lane] += upper * np.int32(above[lane]) + lower * np.int32(below[lane])
            line = out[channel, place]
            for lane in range(len(sums)):
                line[lane] = min(max(sums[lane] >> PRECISION, 0), 255)
    return out


@njit(nogil=True, cache=True)
def in_fours(lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8 (H / 4 rounded upwards, 4 W) of (H, W): four rows take the place of the four bytes of a pixel."""
    made = np.zeros(((len(lines) + 3) // 4, 4 * lines.shape[1]), dtype=np.uint8)
    for row in range(len(lines)):
        for place in range(lines.shape[1]):
            made[row // 4, 4 * place + row % 4] = lines[row, place]
    return made
