"""Read and decode each image of a shard once, for all geometries, a few windows ahead of the device."""

import hashlib
import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkd.base.images.decoding import decode
from mmkd.base.images.pixels import ASSUMED
from mmkd.base.images.source import ImageError, ImageSource
from mmkd.extract.teachers.geometry import Geometry, pixels_of
from mmkd.store.inputs import QUALITY

# Windows of encoded bytes, and of pixels, that may wait: each stage keeps ahead of the next; memory is these times one.
_WINDOWS_READ, _WINDOWS_DECODED = 4, 2


Window = TypeVar("Window")


@dataclass(frozen=True)
class DecodedImage:
    """One image ready for every teacher, or the reason why it is not."""

    reason: str | None = None
    note: str | None = None
    """What was assumed for an odd header of a sound image, as a reason that is no fault."""
    width: int | None = None
    height: int | None = None
    """Pixels, as decoded."""
    image_sha256: str | None = None
    """Digest of the encoded bytes, set even when decoding fails."""
    pixels: dict[Geometry, NDArray[np.uint8]] = field(default_factory=dict)
    """uint8 (C, H, W) for each geometry."""
    jpeg: bytes | None = None
    """Training input, if requested."""
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


def read_image(source: ImageSource) -> tuple[bytes | str, float]:
    """Return one image's bytes, or the reason why there are none, and the seconds it took."""
    started = time.perf_counter()
    try:
        encoded: bytes | str = source.read()
    except Exception as error:  # noqa: BLE001 - see `_reason`
        encoded = _reason(error)
    return encoded, time.perf_counter() - started


def decode_image(
    encoded: bytes | str, read_seconds: float, geometries: Sequence[Geometry], keep: int | None = None
) -> DecodedImage:
    """Decode one image of `read_image`, bring it to all geometries, and to a JPEG of `keep` pixels when that is given.
    Never raises for a bad image: the result has the reason."""
    return decode_pictures(encoded, read_seconds, [lambda image: image], geometries, keep)[0]


def decode_pictures(
    encoded: bytes | str,
    read_seconds: float,
    pictures: Sequence[Callable[[Image.Image], Image.Image]],
    geometries: Sequence[Geometry],
    keep: int | None = None,
) -> list[DecodedImage]:
    """As `decode_image` for each of the pictures that are made of one image, which is decoded once."""
    if isinstance(encoded, str):
        return [DecodedImage(reason=encoded, read_seconds=read_seconds) for _ in pictures]
    started, digest = time.perf_counter(), hashlib.sha256(encoded).hexdigest()
    try:
        image = decode(encoded)
    except Exception as error:  # noqa: BLE001 - see `_reason`
        reason = _reason(error)
        return [DecodedImage(reason=reason, image_sha256=digest, read_seconds=read_seconds) for _ in pictures]
    found: list[DecodedImage] = []
    assumed = image.info.get(ASSUMED)
    for picture_of in pictures:
        try:
            picture = picture_of(image)
            pixels = pixels_of(picture, geometries)
            jpeg = encode_input(picture, keep) if keep is not None else None
        except Exception as error:  # noqa: BLE001 - see `_reason`
            found.append(DecodedImage(reason=_reason(error), image_sha256=digest, read_seconds=read_seconds))
            continue
        found.append(
            DecodedImage(
                note=f"note: {assumed}" if assumed else None,
                width=image.width,
                height=image.height,
                image_sha256=digest,
                pixels=pixels,
                jpeg=jpeg,
                read_seconds=read_seconds,
                decode_seconds=time.perf_counter() - started,
            )
        )
        read_seconds, started = 0.0, time.perf_counter()
    return found


def encode_input(picture: Image.Image, size: int) -> bytes:
    """Encode a picture as JPEG, gray or RGB, its shorter side reduced to `size` pixels, never enlarged."""
    shrunk = picture if picture.mode == "L" else picture.convert("RGB")
    if (shorter := min(shrunk.size)) > size:
        width, height = (max(1, round(side * size / shorter)) for side in shrunk.size)
        shrunk = shrunk.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    shrunk.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    """Return the reason an image cannot be used. Any error of one image, out of memory included, fails its row alone.
    Unexpected errors are reported by type only: a message may quote a patient's name."""
    return f"image: {error}" if isinstance(error, ImageError) else f"image: cannot be used ({type(error).__name__})"


class Threads:
    """Threads of a process that read and decode images, shared by the shards in hand; `read` and `decode` of them."""

    def __init__(self, decode: int = 2, read: int = 4) -> None:
        self.decode, self.read = decode, read
        self.readers = ThreadPoolExecutor(read, thread_name_prefix="mmkd-read")
        self.decoders = ThreadPoolExecutor(decode, thread_name_prefix="mmkd-decode")

    def close(self) -> None:
        """End them; what was not begun is not done."""
        for pool in (self.readers, self.decoders):
            pool.shutdown(wait=False, cancel_futures=True)


def decode_windows(
    sources: Sequence[ImageSource],
    geometries: Sequence[Geometry],
    window: int,
    threads: Threads,
    keep: int | None = None,
) -> Iterator[list[DecodedImage]]:
    """Return the images in order, `window` of them at a time, whatever the number of threads. Some read, others decode
    (Pillow releases the interpreter lock), from this call on, while the caller uses the windows before. An image of
    which neighbors make their pictures is read and decoded once for all of them."""

    def decode_read(encoded: Future[tuple[bytes | str, float]], of: list[ImageSource]) -> list[DecodedImage]:
        return decode_pictures(*encoded.result(), [one.picture for one in of], geometries, keep)

    windows = image_windows(sources, window)
    read = ([(threads.readers.submit(read_image, of[0]), of) for of in wanted] for wanted in windows)
    decoded = (
        [threads.decoders.submit(decode_read, *one) for one in encoded] for encoded in _ahead(read, _WINDOWS_READ)
    )
    ready = _ahead(decoded, _WINDOWS_DECODED)
    return cut((list(chain.from_iterable(future.result() for future in some)) for some in ready), window)


def image_windows(sources: Sequence[ImageSource], window: int) -> Iterator[list[list[ImageSource]]]:
    """Yield the pictures by image, as many images as have `window` pictures or somewhat more."""
    found: list[list[ImageSource]] = []
    for _, same in groupby(sources, key=lambda source: source.origin):
        found.append(list(same))
        if sum(map(len, found)) >= window:
            yield found
            found = []
    if found:
        yield found


def cut(windows: Iterator[list[DecodedImage]], size: int) -> Iterator[list[DecodedImage]]:
    """Yield the same images, `size` at a time: passes are filled whatever the number of pictures of an image."""
    left: list[DecodedImage] = []
    for window in windows:
        left += window
        while len(left) >= size:
            yield left[:size]
            del left[:size]
    if left:
        yield left


def _ahead(windows: Iterator[Window], number: int) -> Iterator[Window]:
    """Return the same windows, each started `number` windows ahead, the first of them by this call."""
    waiting = deque(islice(windows, number))

    def follow() -> Iterator[Window]:
        while waiting:
            ready = waiting.popleft()
            waiting.extend(islice(windows, 1))
            yield ready

    return follow()
