"""Preparing images for nine teachers, which have four geometries: JPEG bytes to the pixels of each, in one thread, by
its processor time. Against each geometry by Pillow on its own, as it was done before; and against the JPEG decoder
alone, which bounds what any resize can gain. The bytes are equal in all cases (tests/test_resampling.py and
tests/test_teachers_geometry.py). Weights are computed anew for each image, as for images of differing sizes.

What was tried, for two sizes of color and one of gray that are made from 500 x 500 pixels:

- Pillow's `resize(box=...)`, to compute only what the crop keeps: not equal, as Pillow holds the box in float32.
- One resize for `shortest` and `hf_shortest`, which differ by their crop at most: kept, with numba and without.
- Compiled loops with Pillow's 22-bit weights, columns first: not equal for tall pictures. From version 13 on, Pillow
  resizes rows first where more than twice as many pixels vanish down as across; in that order all bytes are equal.
- Bands of the picture laid on their side, so that a weight meets many neighboring pixels across, too: the turning alone
  takes longer than the loops after it. Instead the loops read Pillow's own memory (by Arrow, without a copy), where a
  color has four bytes: two pixels make eight products. Numba finds no such vectors: they are spelled out as LLVM's.
- Eight neighbors of gray in a row, summed at the end: slower than color. Four rows in the place of a color's four bytes
  are faster.
- A byte for each channel written as soon as it is summed: a row of words first, separated afterwards, is faster; and
  separated after both passes, of the rows that are left, faster still.
- Four rows at once, so that a weight is loaded for four pixels: columns take 0.6 to 0.75 of the time. Eight rows: no
  more. Pixels widened to 32 bits before the loop, for all weights that meet them: slower, they leave the nearest cache.
  Products of 16 bits in pairs (`pmaddwd`, a weight in two halves): no faster on AMD's Zen 3.
- Four rows a step in the pass down: 0.6 of the time. Its sums in registers, a few bytes of the width at a time: slower.
- Weights read off a comb that Pillow resizes: equal on any machine, but half a millisecond an image, spent in Python.
  Compiled loops compute them in a tenth of it, operation by operation as Pillow does; a test compares them.
- Gray from the very lines of the color, and one compiled call for both passes: less time in Python.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import numpy as np
from PIL import Image

from mmkd.base.images import resampling
from mmkd.base.images.decoding import decode
from mmkd.benchmarks.result import Row, main
from mmkd.extract.teachers.geometry import Geometry, pixels_of

# BiomedCLIP, BMC-CLIP, GenMedCLIP, PMC-CLIP, QuiltNet; PLIP, PubMedCLIP; UniMed-CLIP at 336; MedCLIP.
FOUR = (
    Geometry((224, 224), "bicubic", "shortest", 0, "RGB"),
    Geometry((224, 224), "bicubic", "hf_shortest", 0, "RGB"),
    Geometry((336, 336), "bicubic", "shortest", 0, "RGB"),
    Geometry((224, 224), "bicubic", "pad_square", 0, "L"),
)


def jpeg(width: int, height: int, grain: float) -> bytes:
    """Colored clouds at quality 90, with noise of this standard deviation, which makes decoding slower."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (25, 25, 3), dtype=np.uint8))
    clouds = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    grainy = np.rint((clouds + grain * rng.standard_normal(clouds.shape[:2])[..., None]).clip(0, 255))
    buffer = io.BytesIO()
    Image.fromarray(grainy.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor seconds of each, taken in turn after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            started = time.thread_time()
            contender()
            if number:
                seconds[name].append(time.thread_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def by_pillow(data: bytes, *groups: tuple[Geometry, ...]) -> None:
    """Decode once, and bring the picture to each group of geometries on its own, without compiled loops."""
    picture = decode(data)
    with patch.object(resampling, "compiled_kernels", lambda: None):
        for group in groups:
            pixels_of(picture, group)


def by_kernels(data: bytes) -> None:
    """As extraction does it."""
    resampling._weights.cache_clear()
    pixels_of(decode(data), FOUR)


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    rows = []
    goals = {(500, 500): ">= 3.3", (1000, 1000): ">= 3", (1000, 750): ""}
    for size, goal in goals.items():
        for grain in (0.0, 8.0):
            data = jpeg(*size, grain)
            contenders: dict[str, Callable[[], object]] = {
                "before": partial(by_pillow, data, *((geometry,) for geometry in FOUR)),
                "shared": partial(by_pillow, data, FOUR),
                "now": partial(by_kernels, data),
                "decoding": partial(decode, data),
            }
            rate = {name: 1 / seconds for name, seconds in in_turn(contenders, 200 if full else 40).items()}
            what = f"{size[0]} x {size[1]} pixels, JPEG of {len(data) // 1000} kB"
            alone, unit = "each geometry by Pillow on its own", "images/s"
            rows += [
                Row(what=what, against=alone, value=rate["now"], reference=rate["before"], unit=unit, goal=goal),
                Row(
                    what=f"{what}, without numba", against=alone, value=rate["shared"], reference=rate["before"],
                    unit=unit,
                ),
                Row(
                    what=what, against="the JPEG decoder alone", value=rate["now"], reference=rate["decoding"],
                    unit=unit, note=f"at most {rate['decoding'] / rate['before']:.2g} times before",
                ),
            ]  # fmt: skip
    return rows


if __name__ == "__main__":
    main(measure)
