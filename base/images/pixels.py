"""The rule by which stored samples become 8-bit gray or RGB, the same for every format.

1. Unsigned samples of up to 8 bits are what they are, fewer bits over their own range. Deeper, signed and float samples
   are stretched linearly from their smallest to their largest value in the picture (all color channels together) onto
   0 to 255.
2. A picture of one value has no range: an integer keeps its place in the range of its type, a float in 0 to 1.
3. NaN, values beyond 1e37, a declared no-data or padding value (in color: in all channels), and fully transparent
   pixels are no measurements: they do not count for the range, and all but the last become black. Infinities become the
   nearest end.
4. Where the file says that its smallest value is white, gray is inverted.
5. Alpha is laid over white; samples that were multiplied by it are divided by it first.
6. Lab becomes sRGB, CMYK (255 - C)(255 - K) / 255, palettes and YCbCr RGB; ICC profiles are not applied.
7. The orientation of the file's EXIF is applied.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkd.base.images.source import ImageError

ASSUMED = "assumed"
"""Key of `Image.info`: what a decoder assumed because a header was odd, in a few words."""


def picture_from(
    values: NDArray[Any],
    *,
    white_is_zero: bool = False,
    absent: NDArray[np.bool_] | None = None,
    alpha: NDArray[Any] | None = None,
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """Return an 8-bit `L` or `RGB` picture of `values` (H, W), (H, W, 1) gray or (H, W, 3) RGB of any type; bool is
    black and white. `absent`: bool (H, W), pixels that are no measurements. `alpha`: (H, W), unsigned over its own
    type or float 0 to 1. `limits`: smallest and largest value that the samples can have, where the type does not say.
    Raises ImageError for another shape or type, or nothing but NaN."""
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.shape[2:] not in ((), (3,)) or values.ndim < 2 or values.dtype.kind not in "buif" or not values.size:
        raise ImageError(f"samples of {values.dtype} {values.shape} are no picture")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    gaps = np.zeros(values.shape[:2], dtype=bool) if absent is None else absent
    if values.dtype == np.uint8:
        shown = values
    else:
        # float64 holds every integer of up to 53 bits; of longer ones only last bits are lost.
        wide = values.astype(np.float64)
        # Finite values beyond 1e37 are some program's mark for no data (-3.4e38), declared or not.
        unmeasured = np.isnan(wide) | (np.isfinite(wide) & (np.abs(wide) > 1e37))
        gaps = gaps | unmeasured.reshape(*values.shape[:2], -1).any(axis=2)
        inside = ~gaps if alpha is None else ~gaps & (alpha > 0)
        whole = np.iinfo(values.dtype) if values.dtype.kind in "ui" else None
        shown = _stretch(wide, inside, limits or ((whole.min, whole.max) if whole else (0.0, 1.0)))
    shown = 255 - shown if white_is_zero else shown
    if gaps.any():
        shown = np.where(gaps.reshape(*gaps.shape, *(1,) * (shown.ndim - 2)), 0, shown).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(shown))
    if alpha is None:
        return picture
    share = alpha.astype(np.float64) * (255.0 / (np.iinfo(alpha.dtype).max if alpha.dtype.kind in "ui" else 1.0))
    picture.putalpha(Image.fromarray(np.rint(share.clip(0, 255)).astype(np.uint8)))
    return over_white(picture)


def divide_by_alpha(colors: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Return colors (H, W, C) that were stored multiplied by their alpha (H, W), of the same dtype."""
    most = 1.0 if colors.dtype.kind == "f" else float(np.iinfo(colors.dtype).max)
    shares = colors.astype(np.float64) * np.divide(most, alpha, where=alpha > 0, out=np.zeros(alpha.shape))[..., None]
    return (shares if colors.dtype.kind == "f" else np.rint(shares.clip(0, most))).astype(colors.dtype)


def from_cmyk(ink: NDArray[Any]) -> NDArray[np.uint8]:
    """Return uint8 RGB (H, W, 3) of unsigned ink (H, W, 4): (most - C)(most - K) / most, over the range of the type."""
    most = float(np.iinfo(ink.dtype).max)
    light = most - ink.astype(np.float64)
    return np.rint(light[..., :3] * light[..., 3:] / most * (255 / most)).astype(np.uint8)


def from_lab(picture: Image.Image) -> Image.Image:
    """`RGB` (sRGB) of a picture in Pillow's mode `LAB`."""
    from PIL import ImageCms  # noqa: PLC0415 - its library is loaded for such pictures only

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    shown = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
    assert shown is not None
    return shown


def over_white(picture: Image.Image) -> Image.Image:
    """`LA` and `RGBA` laid over white: `L` and `RGB`."""
    flat = Image.new(picture.mode[:-1], picture.size, "white")
    flat.paste(picture.convert(flat.mode), mask=picture.getchannel("A"))
    return flat


def ppm(picture: Image.Image) -> bytes:
    """Return an `L` or `RGB` picture as bytes that `decode` restores unchanged, with its assumptions."""
    note = picture.info.get(ASSUMED)
    comment = f"# {ASSUMED}: {note}\n" if note else ""
    kind = "P5" if picture.mode == "L" else "P6"
    return f"{kind}\n{comment}{picture.width} {picture.height}\n255\n".encode() + picture.tobytes()


def is_dicom(data: bytes) -> bool:
    """Return True for a Part 10 file, and for a data set that begins without its preamble."""
    if data[128:132] == b"DICM":
        return True
    # Group 0002 or 0008, a small element number, and a VR in capitals or a short length.
    return bool(re.match(rb"[\x02\x08]\x00.\x00(?:[A-Z]{2}|.\x00\x00\x00)", data, re.DOTALL)) and len(data) > 132


def _stretch(wide: NDArray[np.float64], inside: NDArray[np.bool_], limits: tuple[float, float]) -> NDArray[np.uint8]:
    counted = wide[inside]
    counted = counted[np.isfinite(counted)]
    if not counted.size:
        if not np.isfinite(wide).any():
            raise ImageError("no finite value")
        return np.zeros(wide.shape, dtype=np.uint8)
    low, high = float(counted.min()), float(counted.max())
    if low == high:
        low, high = limits
    with np.errstate(invalid="ignore", over="ignore"):
        # Halved first: the range of float64 itself would not fit into float64.
        share = ((wide / 2 - low / 2) / (high / 2 - low / 2)).clip(0, 1)
    return np.rint(np.nan_to_num(share) * 255.0).astype(np.uint8)
