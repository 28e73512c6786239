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
_BLOCK = 4
"""Rows whose pixels meet a weight while it is in a register."""
_BYTE, _NUMBER, _SIZE = (ir.IntType(bits) for bits in (8, 32, 64))


def _vector(values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_NUMBER, len(values)), [ir.Constant(_NUMBER, value) for value in values])


@intrinsic
def _weighted(  # noqa: PLR0913, PLR0917 - an intrinsic has no keywords
    context: Any, pixels: Any, pixel: Any, apart: Any, weights: Any, weight: Any, steps: Any, out: Any, place: Any,
    gap: Any,
) -> Any:  # fmt: skip
    """In each of `_BLOCK` rows, `apart` bytes from each other: write four bytes, the sums of every fourth product of
    the bytes from `pixel` on and the weights from `weight` on, eight a step, to `place` of `out`, the next row's `gap`
    behind it. Of plain loops numba would make no vectors."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        def address(argument: int, kind: Any, *distances: Any) -> Any:
            data = context.make_array(signature.args[argument])(context, builder, given[argument]).data
            for distance in (given[argument + 1], *distances):
                data = builder.gep(data, [distance])
            return builder.bitcast(data, kind.as_pointer())

        def row_of(argument: int, row: int) -> Any:
            return builder.mul(given[argument], ir.Constant(_SIZE, row))

        sums = [cgutils.alloca_once_value(builder, _vector([_HALF] * 4 + [0] * 4)) for _ in range(_BLOCK)]
        with cgutils.for_range(builder, given[5], intp=_SIZE) as loop:
            done = builder.mul(loop.index, ir.Constant(_SIZE, 8))
            factors = builder.load(address(3, ir.VectorType(_NUMBER, 8), done), align=1)
            for row, total in enumerate(sums):
                eight = builder.load(address(0, ir.VectorType(_BYTE, 8), done, row_of(2, row)), align=1)
                product = builder.mul(builder.zext(eight, factors.type), factors)
                builder.store(builder.add(builder.load(total), product), total)
        for row, total in enumerate(map(builder.load, sums)):
            halves = [builder.shuffle_vector(total, total, _vector(list(range(begin, begin + 4)))) for begin in (0, 4)]
            rounded = builder.ashr(builder.add(*halves), _vector([PRECISION] * 4))
            for beyond, limit in (("<", _vector([0] * 4)), (">", _vector([255] * 4))):
                rounded = builder.select(builder.icmp_signed(beyond, rounded, limit), limit, rounded)
            four = builder.trunc(rounded, ir.VectorType(_BYTE, 4))
            builder.store(four, address(6, four.type, row_of(8, row)), align=1)
        return context.get_dummy_value()

    size = types.intp
    return types.void(pixels, size, size, weights, size, size, out, size, size), generate


@njit(nogil=True, cache=True)
def resize_columns(lines: NDArray[np.uint8], firsts: NDArray[np.int64], weights: NDArray[np.int32]) -> Any:
    """Return uint8 (H, 4 w) of (H, 4 W), four bytes a pixel: column i is the sum of the pixels from `firsts[i]` on with
    int32 `weights[i]`, (w, an even number)."""
    (height, length), (width, taps) = lines.shape, weights.shape
    each = np.repeat(weights, 4)  # one for each byte
    out = np.empty((height, 4 * width), dtype=np.uint8)
    block, apart = (_BLOCK, 1) if height >= _BLOCK else (1, 0)  # of fewer rows, one over and over
    for begin in range(0, height, block):
        row = min(begin, height - block)
        for i in range(width):
            pixel, place, weight = row * length + 4 * firsts[i], 4 * (row * width + i), 4 * i * taps
            _weighted(lines, pixel, apart * length, each, weight, taps // 2, out, place, apart * 4 * width)
    return out


@njit(nogil=True, cache=True)
def resize_rows(lines: NDArray[np.uint8], firsts: NDArray[np.int64], weights: NDArray[np.int32]) -> Any:
    """Return uint8 (h, n) of (H, n); the weights as for columns."""
    out = np.empty((len(firsts), lines.shape[1]), dtype=np.uint8)
    sums = np.empty(lines.shape[1], dtype=np.int32)
    for place in range(len(firsts)):
        sums[:] = _HALF
        for tap in range(0, weights.shape[1], 4):
            first, a, b, c, d = firsts[place] + tap, weights[place, tap], weights[place, tap + 1], 0, 0
            last = first + 1
            if tap + 2 < weights.shape[1]:
                last, c, d = first + 3, weights[place, tap + 2], weights[place, tap + 3]
            one, two, three, four = lines[first], lines[first + 1], lines[last - 1], lines[last]
            for lane in range(len(sums)):
                # One sum of all products: LLVM keeps it in 32 bits.
                upper = a * np.int32(one[lane]) + b * np.int32(two[lane])
                sums[lane] += upper + c * np.int32(three[lane]) + d * np.int32(four[lane])
        line = out[place]
        for lane in range(len(sums)):
            line[lane] = min(max(sums[lane] >> PRECISION, 0), 255)
    return out


@njit(nogil=True, cache=True)
def planes(lines: NDArray[np.uint8], channels: int, fours: bool) -> Any:
    """Return uint8 (channels H, W) of (H, 4 W), four bytes a pixel: all rows of a channel, then those of the next one;
    or in order, if they were put `in_fours`."""
    words = lines.view(np.uint32)
    out = np.empty((channels * len(words), words.shape[1]), dtype=np.uint8)
    for row in range(len(words)):
        for channel in range(channels):
            line, word = out[row * channels + channel if fours else row + channel * len(words)], words[row]
            for place in range(len(word)):
                line[place] = word[place] >> (8 * channel) & 255
    return out


@njit(nogil=True, cache=True)
def in_fours(lines: NDArray[np.uint8]) -> Any:
    """Return uint8 (H / 4 rounded upwards, 4 W) of (H, W): four rows take the place of the four bytes of a pixel."""
    words, last = np.empty(((len(lines) + 3) // 4, lines.shape[1]), dtype=np.uint32), len(lines) - 1
    for row in range(len(words)):
        a, b, c = lines[4 * row], lines[min(4 * row + 1, last)], lines[min(4 * row + 2, last)]
        d, word = lines[min(4 * row + 3, last)], words[row]
        for place in range(len(word)):
            word[place] = a[place] | b[place] << 8 | c[place] << 16 | d[place] << 24
    return words.view(np.uint8)


@njit(nogil=True, cache=True)
def resize(
    lines: NDArray[np.uint8], colored: bool, rows_first: bool, left: Any, across: Any, upper: Any, down: Any
) -> Any:
    """Return uint8 (h, w) of (H, W), or (3 h, w) of (H, 4 W), red, green and blue first, that is `colored`. Firsts and
    weights of columns are `left` and `across`, those of rows `upper` and `down`."""
    if rows_first:
        lines = resize_rows(lines, upper, down)
    else:
        lines, upper = lines[upper[0] : upper[-1] + down.shape[1]], upper - upper[0]
    if colored:
        lines = resize_columns(lines, left, across)
        return planes(lines if rows_first else resize_rows(lines, upper, down), 3, False)
    lines = planes(resize_columns(in_fours(lines), left, across), 4, True)[: len(lines)]
    return lines if rows_first else resize_rows(lines, upper, down)


@njit(nogil=True, cache=True)
def gray(lines: NDArray[np.uint8]) -> Any:
    """Return uint8 (H, W) of (H, 4 W), red, green and blue first: ITU-R 601-2 as in libImaging/Convert.c."""
    words = lines.view(np.uint32)
    out = np.empty(words.shape, dtype=np.uint8)
    for row in range(len(words)):
        word, line = words[row], out[row]
        for place in range(len(line)):
            red, green, blue = word[place] & 255, word[place] >> 8 & 255, word[place] >> 16 & 255
            line[place] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return out


@njit(nogil=True, cache=True)
def filter_weights(length: int, target: int, taps: int, cubic: bool) -> Any:
    """Return for each pixel of the target the first source pixel, int64 (target,), and weights from there on, int32
    (target, taps): those of libImaging/Resample.c, operation by operation, for sums round alike."""
    firsts, weights = np.zeros(target, dtype=np.int64), np.zeros((target, taps), dtype=np.int32)
    # One place more: where both ends of the support are whole numbers but for rounding, a last source of weight 0.
    values, scale, stretch = np.empty(taps + 1), length / target, max(length / target, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    for place in range(target):
        center, total = (place + 0.5) * scale, 0.0
        begin, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        firsts[place] = min(begin, length - taps)
        for source in range(begin, end):
            x = abs((source - center + 0.5) * (1.0 / stretch))
            near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            value = (near if x < 1.0 else far if x < 2.0 else 0.0) if cubic else max(1.0 - x, 0.0)
            values[source - begin] = value
            total += value
        for source in range(begin, end):
            value = values[source - begin] / total * (1 << PRECISION)
            if source - firsts[place] < taps:
                weights[place, source - firsts[place]] = int(value - 0.5 if value < 0 else value + 0.5)
    return firsts, weights
