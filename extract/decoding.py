"""Read and decode each image of a shard once, for all geometries, a few windows ahead of the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mmkd.extract.teachers.geometry import Geometry, pixel_transform
from mmkd.store.images import ImageError, ImageSource, decode, sha256
from mmkd.store.inputs import encode_input

# Enough for the decoders to keep ahead of one forward pass; memory is this times a window of pixels.
_WINDOWS_AHEAD = 2


@dataclass(frozen=True)
class DecodedImage:
    """One image ready for every teacher, or the reason why it is not."""

    reason: str | None = None
    width: int | None = None
    height: int | None = None
    """Pixels, as decoded."""
    image_sha256: str | None = None
    """Of the encoded bytes; there even when they cannot be decoded."""
    pixels: dict[Geometry, NDArray[np.uint8]] = field(default_factory=dict)
    """uint8 (C, H, W) for each geometry."""
    jpeg: bytes | None = None
    """For training, when inputs are kept."""
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


def decode_image(source: ImageSource, geometries: Sequence[Geometry], keep: int | None = None) -> DecodedImage:
    """Read one image, bring it to all geometries, and to a JPEG of `keep` pixels when that is given.

    Never raises for a bad image: the result says why.
    """
    started = time.perf_counter()
    digest = None
    try:
        data = source.read()
        read = time.perf_counter()
        digest = sha256(data)
        picture = decode(data)
    except ImageError as error:
        return DecodedImage(reason=f"image: {error}", image_sha256=digest)
    pixels = {geometry: pixel_transform(geometry)(picture) for geometry in geometries}
    return DecodedImage(
        width=picture.width,
        height=picture.height,
        image_sha256=digest,
        pixels=pixels,
        jpeg=encode_input(picture, keep) if keep is not None else None,
        read_seconds=read - started,
        decode_seconds=time.perf_counter() - read,
    )


def decode_windows(
    sources: Sequence[ImageSource | None],
    geometries: Sequence[Geometry],
    window: int,
    threads: int,
    keep: int | None = None,
) -> Iterator[list[DecodedImage | None]]:
    """Yield the shard's images in order, `window` rows at a time; None where a row has no image.

    Decoding runs in `threads` threads (Pillow releases the interpreter lock) while the caller uses the
    window before. What is yielded does not depend on the number of threads.
    """

    def submit(pool: ThreadPoolExecutor, source: ImageSource | None) -> Future[DecodedImage] | None:
        return None if source is None else pool.submit(decode_image, source, geometries, keep)

    starts = iter(range(0, len(sources), window))
    with ThreadPoolExecutor(threads, thread_name_prefix="mmkd-decode") as pool:
        ahead = deque(
            [submit(pool, source) for source in sources[start : start + window]]
            for start in islice(starts, _WINDOWS_AHEAD)
        )
        while ahead:
            current = [None if future is None else future.result() for future in ahead.popleft()]
            for start in islice(starts, 1):
                ahead.append([submit(pool, source) for source in sources[start : start + window]])
            yield current
