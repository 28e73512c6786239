"""Resizing a part, bit by bit, against Pillow's `resize` and `crop`."""

from __future__ import annotations

import importlib
import sys
import tracemalloc
from math import ceil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mmkd.base.images import resampling
from mmkd.base.images.resampling import FILTERS, Canvas, compiled_kernels, resize

Part = tuple[int, int, int, int]


def noise(width: int, height: int, mode: str, seed: int = 0) -> Image.Image:
    """Noise, or for odd seeds hard edges, which go beyond the range of a byte when they are resized."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3)[: 2 if mode == "L" else 3], dtype=np.uint8)
    return Image.fromarray(values // 128 * 255 if seed % 2 else values)


def by_pillow(picture: Image.Image, size: tuple[int, int], interpolation: str, part: Part) -> NDArray[np.uint8]:
    """Pillow itself."""
    values = np.asarray(picture.resize(size, FILTERS[interpolation]).crop(part))
    return values.reshape(*values.shape[:2], -1).transpose(2, 0, 1)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(1, 200),
    st.sampled_from(["L", "RGB", "RGB to L"]), st.sampled_from(list(FILTERS)), st.integers(0, 99),
    st.tuples(*[st.floats(0, 1)] * 4),
)  # fmt: skip
@example(3000, 7, 224, 224, "RGB", "bicubic", 1, (0, 1, 0, 1))
@example(7, 3000, 224, 224, "L", "bicubic", 1, (0, 1, 0, 1))
@example(40, 299, 30, 31, "RGB", "bilinear", 0, (0.3, 0.3, 1, 1))  # rows first, from Pillow 13 on
@example(40, 50, 30, 30, "L", "bicubic", 0, (0, 1, 0, 1))  # twice as much down as across: columns first
@example(40, 51, 30, 30, "L", "bicubic", 0, (0, 1, 0, 1))
@example(300, 3, 80, 80, "RGB", "bilinear", 0, (0, 1, 0, 1))  # fewer rows than are computed together
@example(64, 90, 64, 90, "RGB", "bicubic", 0, (0, 1, 0, 1))
def test_a_part_is_that_of_pillow(
    width: int, height: int, to_width: int, to_height: int, mode: str, interpolation: str, seed: int,
    shares: tuple[float, float, float, float],
) -> None:  # fmt: skip
    left, right = sorted(int(share * (to_width - 1)) for share in shares[:2])
    top, bottom = sorted(int(share * (to_height - 1)) for share in shares[2:])
    part = left, top, right + 1, bottom + 1
    given, _, wanted = mode.partition(" to ")
    picture = noise(width, height, given, seed)
    found = resize(Canvas(picture, wanted or given), (to_width, to_height), interpolation, part)
    assert found.dtype == np.uint8
    assert np.array_equal(
        found, by_pillow(picture.convert(wanted or given), (to_width, to_height), interpolation, part)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 900), st.integers(1, 500), st.sampled_from(list(FILTERS)))
@example(500, 224, "bicubic")
@example(1000, 336, "bicubic")
def test_weights_are_those_of_pillow(length: int, target: int, interpolation: str) -> None:
    pytest.importorskip("numba", reason="the extra fast is not installed")
    if (found := resampling._weights(length, target, interpolation)) is None:
        return
    assert_weights_of_pillow(length, target, interpolation, *found)


@pytest.mark.parametrize(
    ("length", "target", "interpolation"),
    [(5, 77, "bicubic"), (12, 44, "bicubic"), (31, 39, "bicubic"), (7, 55, "bilinear"), (42, 62, "bilinear")],
)
def test_a_support_of_one_source_more_stays_inside_its_arrays(length: int, target: int, interpolation: str) -> None:
    kernels = pytest.importorskip("mmkd.base.images.kernels", reason="the extra fast is not installed")
    cubic = interpolation == "bicubic"
    taps = 2 * ceil((2 if cubic else 1) * max(length / target, 1.0))
    # As Python: NumPy checks the bounds, which compiled loops do not.
    found = kernels.filter_weights.py_func(length, target, taps, cubic)
    assert_weights_of_pillow(length, target, interpolation, *found)


def assert_weights_of_pillow(
    length: int, target: int, interpolation: str, firsts: NDArray[np.int64], weights: NDArray[np.int32]
) -> None:
    # In mode I Pillow resizes by the weights themselves: row i of the result has those of source pixel i.
    ones = Image.fromarray(np.eye(length, dtype=np.int32) << 22)
    expected = np.asarray(ones.resize((target, length), FILTERS[interpolation]))
    laid = np.zeros((target, length), dtype=np.int32)
    np.put_along_axis(laid, firsts[:, None] + np.arange(weights.shape[1]), weights, axis=1)
    assert np.array_equal(laid.T, expected)


def test_gray_is_that_of_pillow() -> None:
    pytest.importorskip("numba", reason="the extra fast is not installed")
    picture = noise(1500, 1400, "RGB")
    assert np.array_equal(Canvas(picture, "L").lines, np.asarray(picture.convert("L")))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_compiled_loops_do_the_work(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the extra fast is not installed")
    picture, part = noise(90, 70, mode), (1, 2, 40, 29)
    expected = by_pillow(picture, (41, 32), "bicubic", part)

    def refused(*_: object) -> Image.Image:
        raise AssertionError("Pillow resized the picture")

    monkeypatch.setattr(Image.Image, "resize", refused)
    assert np.array_equal(resize(Canvas(picture, picture.mode), (41, 32), "bicubic", part), expected)


def test_pillow_resizes_what_it_keeps_in_pieces() -> None:
    # 16 MB are the most of one piece.
    picture, part = noise(2100, 2000, "RGB"), (0, 0, 50, 50)
    assert np.array_equal(
        resize(Canvas(picture, picture.mode), (60, 50), "bilinear", part),
        by_pillow(picture, (60, 50), "bilinear", part),
    )


@pytest.mark.parametrize("turned", [False, True])
def test_a_thin_picture_takes_little_memory(turned: bool) -> None:
    # Pillow's own memory is not counted; a comb of weights for 100,000 pixels would take 2 GB of NumPy's.
    lengths, target = (20, 100_000), (44, 224)
    picture = noise(*(lengths[::-1] if turned else lengths), "L")
    size = target[::-1] if turned else target
    expected = by_pillow(picture, size, "bicubic", (0, 0, *size))
    tracemalloc.start()
    try:
        found = resize(Canvas(picture, picture.mode), size, "bicubic", (0, 0, *size))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, expected)
    assert peak < 32 << 20


def test_without_numba_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("weights are of use to the compiled loops alone")

    monkeypatch.setattr(resampling, "_weights", refused)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "mmkd.base.images.kernels", raising=False)
    monkeypatch.delattr(importlib.import_module("mmkd.base.images"), "kernels", raising=False)
    compiled_kernels.cache_clear()
    try:
        assert compiled_kernels() is None
        picture, part = noise(90, 70, "RGB"), (1, 2, 40, 30)
        assert np.array_equal(
            resize(Canvas(picture, picture.mode), (41, 32), "bicubic", part),
            by_pillow(picture, (41, 32), "bicubic", part),
        )
    finally:
        compiled_kernels.cache_clear()


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_size_of_no_pixel(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="height and width must be > 0"):
        resize(Canvas(noise(9, 9, "L"), "L"), size, "bicubic", (0, 0, 1, 1))
