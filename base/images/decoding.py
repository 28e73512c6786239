"""From encoded bytes to a decoded picture, or to one line that says why not. `uri` finds the bytes."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import struct
import sys
import warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mmkd.base.images.pixels import ASSUMED, is_dicom, over_white, picture_from
from mmkd.base.images.source import MAX_PIXELS, ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
"""The only decoders that untrusted bytes meet: Pillow knows forty more, one of which (EPS) runs Ghostscript."""

# `decode` checks the size itself; this is for pictures inside other formats. Pillow raises at twice this and warns
# before, which `decode` knows better.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What the decoders raise on damaged files; OSError covers `truncated` and unreadable files.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, zlib.error),
    *(TypeError, ArithmeticError, AttributeError, RuntimeError),
)
# TIFF's tags.
_BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _PLANAR, _FORMAT, _NO_DATA = 258, 259, 262, 274, 284, 339, 42113
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PREMULTIPLIED = 1


def decode(data: bytes) -> Image.Image:
    """Decode an image fully to 8-bit `L` or `RGB`, by the rule of `pixels`.

    Of several frames (GIF, TIFF) the first is taken; of a multi-frame DICOM the middle one. `info["assumed"]` says what
    was assumed where a header was odd.

    Raises:
        ImageError: not an image, damaged, or more than `MAX_PIXELS`.
    """
    if is_dicom(data):
        try:
            from mmkd.base.images.dicom import decode_dicom  # noqa: PLC0415 - an extra
        except ImportError:
            raise ImageError("DICOM needs mmkd[dicom]") from None
        return decode_dicom(data)
    try:
        picture = _open(data)
        if picture is None:
            return _decode_with_tifffile(data)
        _check_size(picture.width, picture.height)
        values = _deep_samples(data, picture)
        picture.load()
    except _DECODER_ERRORS as error:
        raise ImageError("truncated" if "truncated" in str(error) else "damaged") from None
    shown = _from_samples(picture, values) if values is not None else _eight_bits(picture)
    if data[:2] in (b"P5", b"P6") and (said := re.match(rb"P[56]\n# assumed: ([^\n]+)\n", data)):
        shown.info[ASSUMED] = said[1].decode()
    return shown


def sha256(data: bytes) -> str:
    """SHA-256 of encoded bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image | None:
    """The picture before its pixels are read; None for a TIFF that Pillow cannot read, or would read wrongly."""
    try:
        picture = Image.open(io.BytesIO(data), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return None
        raise ImageError("not an image that Pillow knows") from None
    except _DECODER_ERRORS:
        raise ImageError("damaged header") from None
    if picture.format == "TIFF":
        bits, planar = _tag(picture, _BITS, (1,)), _tag(picture, _PLANAR, 1)
        signed_colors = len(bits) > 1 and set(_tag(picture, _FORMAT, (1,))) != {1}
        # libtiff gives samples in the machine's byte order, which Pillow knows of 16 unsigned bits only.
        swapped = data[:2] == (b"MM" if sys.byteorder == "little" else b"II") and _tag(picture, _COMPRESSION, 1) != 1
        if (planar == 2 and max(bits) > 8) or signed_colors or (swapped and picture.mode in ("I", "F")):
            return None
    return picture


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels")


def _tag(picture: Any, tag: int, default: Any) -> Any:
    value = picture.tag_v2.get(tag, default)
    return (value,) if isinstance(default, tuple) and not isinstance(value, tuple) else value


def _deep_samples(data: bytes, picture: Any) -> NDArray[Any] | None:
    """uint16 (H, W, channels) of pictures with 16 bits a channel, of which Pillow keeps the upper eight.

    Decoded twice: Pillow's big-endian unpacker takes the first byte of each sample, the little-endian one the second.
    """
    if not picture.tile:
        return None
    args = picture.tile[0][3]
    raw = args[0] if isinstance(args, tuple) and args else args
    if not isinstance(raw, str):
        return None
    if picture.format == "PPM" and raw == "RGB" and len(args) > 1 and isinstance(args[1], int) and args[1] > 255:
        if data[:2] != b"P6":
            return None
        # Pillow scales by the largest value that the header allows.
        picture.tile = [("raw", (0, 0, *picture.size), picture.tile[0][2], ("RGB;16B", 0, 1))]
        raw = "RGB;16B"
    if picture.format == "PNG" and raw == "LA;16B":
        both = _with_raw_mode(picture, "RGBA", "RGBA")
        return np.ascontiguousarray(np.asarray(both)).view(">u2").astype(np.uint16)
    name, _, order = raw.partition(";16")
    if name not in ("RGB", "RGBA", "RGBa", "RGBX", "CMYK") or order not in ("L", "B", "N"):
        return None
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    other: Any = Image.open(io.BytesIO(data), formats=[picture.format])
    if picture.format == "PPM":
        other.tile = picture.tile
    # "RGBa" would be divided by its alpha, byte by byte: that is done below with all 16 bits.
    plain = {"RGBa": "RGBA"}.get(name, name)
    mode = "RGB" if name == "RGBX" else plain
    upper = np.asarray(_with_raw_mode(picture, mode, f"{plain};16{order}"), dtype=np.uint16)
    lower = np.asarray(_with_raw_mode(other, mode, f"{plain};16{'B' if order == 'L' else 'L'}"), dtype=np.uint16)
    deep: NDArray[Any] = (upper << 8) | lower
    if name == "RGBa":
        deep = np.concatenate([_divided(deep[..., :3], deep[..., 3]), deep[..., 3:]], axis=2)
    return deep


def _with_raw_mode(picture: Any, mode: str, raw: str) -> Image.Image:
    args = [raw if isinstance(tile[3], str) else (raw, *tile[3][1:]) for tile in picture.tile]
    # Plain tuples up to Pillow 11.0.
    picture.tile = [
        tile._replace(args=new) if hasattr(tile, "_replace") else (*tile[:3], new)
        for tile, new in zip(picture.tile, args, strict=True)
    ]
    picture._mode = mode
    picture.load()
    return picture  # type: ignore[no-any-return]


def _divided(colors: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Colors (H, W, 3) that were stored multiplied by their alpha (H, W)."""
    most = np.iinfo(colors.dtype).max
    shares = colors.astype(np.float64) * (most / np.maximum(alpha, 1)[..., None])
    divided: NDArray[Any] = np.rint(shares.clip(0, most)).astype(colors.dtype)
    return divided


def _from_samples(picture: Image.Image, values: NDArray[Any]) -> Image.Image:
    channels = values.shape[2]
    if picture.mode == "CMYK":
        ink = 65535 - values.astype(np.float64)
        shown = Image.fromarray(np.rint(ink[..., :3] * ink[..., 3:] / 65535 * (255 / 65535)).astype(np.uint8))
    elif channels in (2, 4):
        shown = picture_from(values[..., :-1], alpha=values[..., -1])
    else:
        clear = picture.info.get("transparency")
        alpha = None
        if isinstance(clear, tuple):
            alpha = np.where((values == np.array(clear)).all(axis=2), 0, 255).astype(np.uint8)
        shown = picture_from(values, alpha=alpha)
    return _upright(picture, shown)


def _upright(picture: Image.Image, shown: Image.Image) -> Image.Image:
    """`shown`, turned as the EXIF of `picture` says; an unreadable EXIF turns nothing."""
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except _DECODER_ERRORS:
        turn = None
    return shown if turn is None else shown.transpose(turn)


def _eight_bits(picture: Any) -> Image.Image:
    """The rule for what Pillow decodes to modes of its own."""
    mode = picture.mode
    tiff = picture.format == "TIFF"
    if mode.startswith(("I", "F")) or (tiff and _tag(picture, _FORMAT, (1,))[0] != 1):
        values = np.asarray(picture)
        absent = None
        white_is_zero = False
        if tiff:
            kind, bits = _tag(picture, _FORMAT, (1,))[0], _tag(picture, _BITS, (1,))[0]
            # Pillow keeps the bits and forgets their sign.
            sign = {(1, 32): np.uint32, (2, 8): np.int8}.get((kind, bits))
            values = values if sign is None else values.view(sign)
            white_is_zero = _tag(picture, _PHOTOMETRIC, 1) == 0
            absent = _no_data(values, picture.tag_v2.get(_NO_DATA))
        return _upright(picture, picture_from(values, white_is_zero=white_is_zero, absent=absent))
    if mode == "LAB":
        from PIL import ImageCms  # noqa: PLC0415 - its library is loaded for such pictures only

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        assert shown is not None
    elif mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        grey = mode in ("L", "1", "LA", "La")
        # Pillow has no way from La but through LA, and none from L with a transparent value to LA.
        shown = over_white(picture.convert("LA") if mode in ("LA", "La") else picture.convert("RGBA"))
        shown = shown.convert("L") if grey else shown
    else:
        shown = picture if mode in ("L", "RGB") else picture.convert("L" if mode == "1" else "RGB")
    return _upright(picture, shown)


def _no_data(values: NDArray[Any], said: object) -> NDArray[np.bool_] | None:
    """Pixels of the value that GDAL's tag declares to be none."""
    try:
        value = float(str(said).strip("\0 "))
    except ValueError:
        return None
    return np.asarray(values == values.dtype.type(value)) if values.dtype.kind == "f" else np.asarray(values == value)


def _decode_with_tifffile(data: bytes) -> Image.Image:
    """Samples of any type and planar layouts: what Pillow does not read of TIFF."""
    try:
        import tifffile  # noqa: PLC0415 - an extra
    except ImportError:
        raise ImageError("TIFF of a kind that needs the package tifffile") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        if not isinstance(page, tifffile.TiffPage) or page.imagedepth != 1:
            raise ImageError("TIFF: its first page is no picture")
        _check_size(page.imagewidth, page.imagelength * max(1, page.samplesperpixel // 4))
        try:
            values = page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error) or page.compression not in (1, 8, 32773, 32946):
                raise ImageError(f"TIFF: {page.dtype} in compression {page.compression.name} is not read") from None
            raise
        if page.planarconfig == 2 and values.ndim == 3:
            values = np.moveaxis(values, 0, 2)
        values = values[..., None] if values.ndim == 2 else values
        colors = {0: 1, 1: 1, 2: 3}.get(int(page.photometric), 0)
        if colors == 0 or values.ndim != 3 or values.shape[2] < colors or values.dtype.kind not in "uif":
            raise ImageError(f"TIFF: {page.dtype} as {page.photometric.name} is not read")
        extra = [int(kind) for kind in page.extrasamples] + [0] * 9
        alpha = values[..., colors] if values.shape[2] > colors and extra[0] in (1, 2) else None
        values = values[..., :colors]
        if alpha is not None and extra[0] == _PREMULTIPLIED and colors == 3 and values.dtype.kind == "u":
            values = _divided(values, alpha)
        nodata = page.tags.get(_NO_DATA)
        absent = _no_data(values, nodata.value) if nodata is not None else None
        orientation = page.tags.get(_ORIENTATION)
        shown = picture_from(
            values,
            white_is_zero=int(page.photometric) == 0,
            absent=None if absent is None else np.asarray(absent.any(axis=2)),
            alpha=alpha,
        )
        turn = _TURNS.get(int(orientation.value)) if orientation is not None else None
    return shown if turn is None else shown.transpose(turn)
