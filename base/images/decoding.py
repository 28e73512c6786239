"""From encoded bytes to a decoded picture, or to one line that says why not. `sources` finds the bytes."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmkd.base.images.source import MAX_PIXELS, ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""The only decoders that untrusted bytes meet: Pillow knows forty more, one of which (EPS) runs Ghostscript."""

# `decode` checks the size itself; this is for pictures inside other formats. Pillow raises at twice this and warns
# before, which `decode` knows better.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What Pillow's decoders raise on damaged files; OSError covers `truncated` and unreadable files.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def decode(data: bytes) -> Image.Image:
    """Decode an image fully; 16-bit and float pictures are stretched to 8 bits over their own range.

    Of several frames (GIF, TIFF) the first is taken; of a multi-frame DICOM the middle one (see `dicom_frame`).

    Raises:
        ImageError: not an image, damaged, or more than `MAX_PIXELS`.
    """
    if data[128:132] == b"DICM":
        try:
            from mmkd.base.images.dicom import decode_dicom  # noqa: PLC0415 - an extra
        except ImportError:
            raise ImageError("DICOM needs mmkd[dicom]") from None
        return decode_dicom(data)
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from None
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
