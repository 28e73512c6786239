"""From a sample row to a decoded picture, or to one line that says why not."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 1 << 27
"""134 million pixels (11,585 squared): a decompression bomb would take 400 MB and more per decoding thread."""

MAX_BYTES = 1 << 30
"""Encoded bytes read for one image; what is larger is no picture."""

# `decode` checks the size in the header itself; Pillow would warn at one size and raise at another.
Image.MAX_IMAGE_PIXELS = None

# What Pillow's decoders raise on damaged files; OSError covers `truncated` and unreadable files.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


class ImageError(Exception):
    """An image cannot be used; the message is the row's reason, without the word `image`."""


@dataclass(frozen=True)
class ImageSource:
    """Where one image's encoded bytes are."""

    path: Path
    offset: int | None = None
    length: int | None = None

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            ImageError: missing, empty, cut off, or too large.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset or 0)
                data = file.read(self.length if self.length is not None else MAX_BYTES + 1)
        except OSError as error:
            # The path is in the row already; a reason must be the same for equal faults to be counted.
            raise ImageError(
                "file not found" if isinstance(error, FileNotFoundError) else str(error.strerror)
            ) from error
        if not data:
            raise ImageError("empty file")
        if self.length is not None and len(data) < self.length:
            raise ImageError("archive ends inside this member")
        if len(data) > MAX_BYTES:
            raise ImageError(f"larger than {MAX_BYTES >> 20} MB")
        return data


def decode(data: bytes) -> Image.Image:
    """Decode an image fully; 16-bit and float pictures are stretched to 8 bits over their own range.

    Raises:
        ImageError: not an image, damaged, or more than `MAX_PIXELS`.
    """
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow knows") from None
    except _DECODER_ERRORS:
        raise ImageError("damaged header") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels")
    try:
        picture.load()
    except _DECODER_ERRORS as error:
        raise ImageError("truncated" if "truncated" in str(error) else "damaged") from None
    return _eight_bit(picture)


def sha256(data: bytes) -> str:
    """SHA-256 of encoded bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def _eight_bit(picture: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255 and turns a 12-bit radiograph white.
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
