"""Decode image bytes, or give a one-line reason; `uri` finds the bytes."""

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

from mmkd.base.images.pixels import ASSUMED, divide_by_alpha, from_cmyk, from_lab, is_dicom, over_white, picture_from
from mmkd.base.images.source import MAX_PIXELS, ImageError, check_pixels

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
_RGB, _PALETTE, _INK, _CIE_LAB, _ICC_LAB = 2, 3, 5, 8, 9
# By TIFF's photometric interpretation: channels, and the kinds of samples that are read.
_TIFF_COLORS = {
    0: (1, "buif"), 1: (1, "buif"), _RGB: (3, "buif"), _PALETTE: (1, "u"), _INK: (4, "u"),
    _CIE_LAB: (3, "u"), _ICC_LAB: (3, "u"),
}  # fmt: skip


def decode(data: bytes) -> Image.Image:
    """Decode an image fully to 8-bit `L` or `RGB`, by the rule of `pixels`: of several frames the first, of a DICOM the
    middle one. `info["assumed"]` says what was assumed where a header was odd. Raises ImageError if it is not an image,
    is damaged, or has more than `MAX_PIXELS`."""
    if is_dicom(data):
        try:
            from mmkd.base.images.dicom import decode_dicom  # noqa: PLC0415 - an extra
        except ImportError:
            raise ImageError("DICOM needs the extra dicom") from None
        return decode_dicom(data)
    try:
        if (picture := _open(data)) is None:
            return _decode_with_tifffile(data)
        check_pixels(picture.width * picture.height)
        deep = _deep_samples(data, picture)
        picture.load()
    except _DECODER_ERRORS as error:
        raise ImageError("truncated" if "truncated" in str(error) else "damaged") from None
    try:
        orientation = picture.getexif().get(_ORIENTATION)
    except _DECODER_ERRORS:
        orientation = None
    shown = _orient(_apply_rule(picture, deep), orientation)
    if data[:2] in (b"P5", b"P6") and (said := re.match(rb"P[56]\n# assumed: ([^\n]+)\n", data)):
        shown.info[ASSUMED] = said[1].decode()
    return shown


def _open(data: bytes) -> Image.Image | None:
    """Return the picture before its pixels are read; None for a TIFF that Pillow cannot read, or would read wrongly."""
    try:
        Image.init()
        picture = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
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
        if (
            (planar == 2 and (max(bits) > 8 or len(bits) == 2))
            or signed_colors
            or (swapped and picture.mode in ("I", "F"))
        ):
            return None
    return picture


def _tag(picture: Any, tag: int, default: Any) -> Any:
    value = picture.tag_v2.get(tag, default)
    return (value,) if isinstance(default, tuple) and not isinstance(value, tuple) else value


def _deep_samples(data: bytes, picture: Any) -> NDArray[Any] | None:
    """Return uint16 (H, W, channels) of 16 bits per channel, of which Pillow keeps the upper eight. Decoded twice:
    Pillow's big-endian unpacker takes the first byte of each sample, the little-endian one the second."""
    args: Any = picture.tile[0][3] if picture.tile else None
    raw = args[0] if isinstance(args, tuple) and args else args
    if not isinstance(raw, str):
        return None
    if picture.format == "PPM" and raw == "RGB" and len(args) > 1 and isinstance(args[1], int) and args[1] > 255:
        if data[:2] != b"P6":
            return None
        # Pillow scales by the largest value that the header allows.
        picture.tile = [picture.tile[0]._replace(codec_name="raw", args=("RGB;16B", 0, 1))]
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
        deep = np.concatenate([divide_by_alpha(deep[..., :3], deep[..., 3]), deep[..., 3:]], axis=2)
    return deep


def _with_raw_mode(picture: Any, mode: str, raw: str) -> Image.Image:
    args = [raw if isinstance(tile[3], str) else (raw, *tile[3][1:]) for tile in picture.tile]
    picture.tile = [tile._replace(args=new) for tile, new in zip(picture.tile, args, strict=True)]
    picture._mode = mode
    picture.load()
    return picture


def _apply_rule(picture: Any, deep: NDArray[Any] | None) -> Image.Image:
    """Apply the rule of `pixels`; `deep` has the samples (H, W, channels) where Pillow dropped bits."""
    tiff, mode, clear = picture.format == "TIFF", picture.mode, picture.info.get("transparency")
    if deep is not None and mode == "CMYK":
        return Image.fromarray(from_cmyk(deep))
    if deep is not None and deep.shape[2] in (2, 4):
        return picture_from(deep[..., :-1], alpha=deep[..., -1])
    if deep is not None or mode.startswith(("I", "F")) or (tiff and _tag(picture, _FORMAT, (1,))[0] != 1):
        values = np.asarray(picture) if deep is None else deep
        white_is_zero = False
        if tiff and deep is None:
            kind, bits = _tag(picture, _FORMAT, (1,))[0], _tag(picture, _BITS, (1,))[0]
            # Pillow keeps the bits and forgets their sign.
            sign = {(1, 32): np.uint32, (2, 8): np.int8}.get((kind, bits))
            values = values if sign is None else values.view(sign)
            white_is_zero = _tag(picture, _PHOTOMETRIC, 1) == 0
        alpha = None
        if isinstance(clear, tuple | int):
            equal = values.reshape(*values.shape[:2], -1) == np.array(clear)
            alpha = np.where(equal.all(axis=2), 0, 255).astype(np.uint8)
        absent = _no_data(values, picture.tag_v2.get(_NO_DATA)) if tiff else None
        return picture_from(values, white_is_zero=white_is_zero, absent=absent, alpha=alpha)
    if mode == "LAB":
        return from_lab(picture)
    gray = mode in ("1", "L", "LA", "La")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or clear is not None:
        # Pillow has no way from La but through LA, and none from L with a transparent value to LA.
        flat = over_white(picture.convert("LA" if mode in ("LA", "La") else "RGBA"))
    else:
        flat = picture if mode == "RGB" else picture.convert("L" if gray else "RGB")
    flat = flat.convert("L") if gray else flat
    if tiff and mode in ("L", "RGB", "RGBA") and _NO_DATA in picture.tag_v2:
        values = np.asarray(picture)[..., :3] if mode == "RGBA" else np.asarray(picture)
        inverted = mode == "L" and _tag(picture, _PHOTOMETRIC, 1) == 0
        absent = _no_data(255 - values if inverted else values, picture.tag_v2[_NO_DATA])
        return picture_from(np.asarray(flat), absent=absent)
    return flat


def _no_data(values: NDArray[Any], said: object) -> NDArray[np.bool_] | None:
    """Return bool (H, W): pixels whose samples all equal GDAL's no-data tag."""
    try:
        value = float(str(said).strip("\0 "))
    except ValueError:
        return None
    equal = values == (values.dtype.type(value) if values.dtype.kind == "f" else value)
    return np.asarray(equal.reshape(*values.shape[:2], -1).all(axis=2))


def _orient(shown: Image.Image, orientation: object) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the EXIF block again, which fails on damaged ones.
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return shown if turn is None else shown.transpose(turn)


def _decode_with_tifffile(data: bytes) -> Image.Image:
    """Return samples of any type, planes, deep palettes, ink and Lab: what Pillow does not read of TIFF."""
    try:
        import tifffile  # noqa: PLC0415 - an extra
    except ImportError:
        raise ImageError("TIFF of a kind that needs the package tifffile") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        if not isinstance(page, tifffile.TiffPage) or page.imagedepth != 1:
            raise ImageError("TIFF: its first page is no picture")
        check_pixels(page.imagewidth * page.imagelength * max(1, page.samplesperpixel // 4))
        try:
            values = page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error) or page.compression not in (1, 8, 32773, 32946):
                raise ImageError(f"TIFF: {page.dtype} in compression {page.compression.name} is not read") from None
            raise
        kind = int(page.photometric)
        if values.ndim == 2:
            values = values[..., None]
        elif page.planarconfig == 2 and values.ndim == 3:
            values = np.moveaxis(values, 0, 2)
        colors, types = _TIFF_COLORS.get(kind, (0, ""))
        if colors == 0 or values.ndim != 3 or values.shape[2] < colors or values.dtype.kind not in types:
            raise ImageError(f"TIFF: {page.dtype} as {page.photometric.name} is not read")
        extra = int(page.extrasamples[0]) if page.extrasamples and values.shape[2] > colors else 0
        alpha = values[..., colors] if extra in (1, 2) else None
        values = values[..., :colors]
        # 1: the colors were multiplied by it.
        if alpha is not None and extra == 1 and kind <= _RGB and values.dtype.kind in "uf":
            values = divide_by_alpha(values, alpha)
        absent = _no_data(values, page.tags[_NO_DATA].value) if _NO_DATA in page.tags else None
        if kind == _PALETTE:
            values = (np.asarray(page.colormap)[:, values[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        elif kind == _INK:
            values = from_cmyk(values)
        elif kind in (_CIE_LAB, _ICC_LAB):
            values = np.asarray(from_lab(_lab_picture(values, icc=kind == _ICC_LAB)))
        shown = picture_from(values, white_is_zero=kind == 0, absent=absent, alpha=alpha)
        orientation = page.tags.get(_ORIENTATION)
        return _orient(shown, None if orientation is None else int(orientation.value))


def _lab_picture(values: NDArray[Any], icc: bool) -> Image.Image:
    """Return uint8 or uint16 (H, W, 3) as Pillow's `LAB`: 8 bits, a and b signed. ICC's a and b are offset, not signed.
    Source: TIFF 6.0, section 23; Adobe's TIFF technical note 4 (ICCLab: L of 100 is 65280 in 16 bits)."""
    if values.dtype == np.uint16:
        scale = np.array([256 if icc else 257, 256, 256])
        wide = values.astype(np.int64)
        wide[..., 1:] -= 0 if icc else (wide[..., 1:] >> 15) << 16
        values = np.rint(wide / scale).clip((0, *(0 if icc else -128,) * 2), (255, *(255 if icc else 127,) * 2))
    encoded = values.astype(np.int64) & 0xFF
    encoded[..., 1:] ^= 128 if icc else 0
    size = values.shape[1], values.shape[0]
    return Image.frombytes("LAB", size, encoded.astype(np.uint8).tobytes(), "raw", "LAB")
