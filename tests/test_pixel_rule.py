"""What a file's samples become, in every mode that Pillow and tifffile write, against the rule stated once more."""

from __future__ import annotations

import io
import itertools
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from mmkd.base.images.cells import NpzImage
from mmkd.base.images.decoding import decode
from mmkd.base.images.pixels import ASSUMED, ppm
from mmkd.base.images.source import ImageError
from mmkd.base.places.remote import as_root

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = ("float16", "float32", "float64")


def ruled(values: np.ndarray, white_is_zero: bool = False, alpha: np.ndarray | None = None) -> np.ndarray:
    """The rule of docs/corpora.md, value by value in Python's own numbers."""
    plain = values.tolist()
    grey = values.ndim == 2
    rows, columns = values.shape[:2]
    pixels = [[plain[y][x] if not grey else [plain[y][x]] for x in range(columns)] for y in range(rows)]
    if values.dtype == bool:
        pixels = [[[255 * value for value in pixel] for pixel in row] for row in pixels]
    clear = [[alpha is not None and not alpha[y, x] for x in range(columns)] for y in range(rows)]
    deep = values.dtype not in (np.uint8, bool)
    counted = [
        value
        for y, x in itertools.product(range(rows), range(columns))
        for value in pixels[y][x]
        if not clear[y][x] and math.isfinite(value)
    ]
    low, high = (min(counted), max(counted)) if counted else (0, 1)
    if low == high and deep:
        low, high = (0, 1) if values.dtype.kind == "f" else (np.iinfo(values.dtype).min, np.iinfo(values.dtype).max)
        low, high = int(low), int(high)
    shown = np.zeros((rows, columns, len(pixels[0][0])))
    for y, x in itertools.product(range(rows), range(columns)):
        if any(math.isnan(value) for value in pixels[y][x]):
            continue
        for channel, value in enumerate(pixels[y][x]):
            level = min(max((value - low) / (high - low), 0), 1) * 255 if deep else int(value)
            level = round(level)
            level = 255 - level if white_is_zero else level
            if alpha is not None:
                top = np.iinfo(alpha.dtype).max if alpha.dtype.kind == "u" else 1
                share = round(float(alpha[y, x]) / top * 255) / 255
                level = level * share + 255 * (1 - share)
            shown[y, x, channel] = level
    return shown[..., 0] if grey else shown


def ramp(dtype: str, channels: int = 0) -> np.ndarray:
    """Samples over a part of the type's range, with both ends of it."""
    shape = (6, 8, channels) if channels else (6, 8)
    count = int(np.prod(shape))
    if dtype.startswith("float"):
        values = np.linspace(-3, 4, count)
    else:
        most = int(np.iinfo(dtype).max)
        values = np.array([most // 3 + index * (most // (3 * count)) for index in range(count)], dtype=object)
        if np.iinfo(dtype).min < 0:
            values = values - most // 2
        elif dtype == "uint32":
            values = values + (1 << 30)
    return values.astype(dtype).reshape(shape)


def tiff(values: np.ndarray, **options: object) -> bytes:
    """The array as tifffile writes it."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def shown(data: bytes) -> np.ndarray:
    """Pixels of a decoded file."""
    picture = decode(data)
    assert picture.mode in ("L", "RGB")
    return np.asarray(picture).astype(float)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_every_type_that_tifffile_writes(dtype: str, photometric: str, order: str, compression: str | None) -> None:
    values = ramp(dtype, 3 if photometric == "rgb" else 0)
    data = tiff(values, photometric=photometric, byteorder=order, compression=compression)
    expected = ruled(values, photometric == "miniswhite")
    assert np.abs(shown(data) - expected).max() <= (0 if dtype == "uint8" else 1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_planes_of_their_own(dtype: str) -> None:
    values = ramp(dtype, 3)
    data = tiff(np.moveaxis(values, 2, 0), photometric="rgb", planarconfig="separate")
    assert np.abs(shown(data) - ruled(values)).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "layout", [{}, {"planarconfig": "separate"}, {"planarconfig": "separate", "compression": "zlib"}]
)
def test_alpha_lies_over_white_and_clear_pixels_have_no_say(dtype: str, channels: int, layout: dict[str, str]) -> None:
    colors = ramp(dtype, channels)
    colors[0, 0] = 0
    alpha = np.full(colors.shape[:2], np.iinfo(dtype).max, dtype)
    alpha[0, 0], alpha[1, 1] = 0, np.iinfo(dtype).max // 2
    stored = np.dstack([colors, alpha])
    stored = np.moveaxis(stored, 2, 0) if layout else stored
    photometric = "rgb" if channels == 3 else "minisblack"
    data = tiff(stored, photometric=photometric, extrasamples=["unassalpha"], **layout)
    expected = ruled(colors if channels == 3 else colors[..., 0], alpha=alpha)
    assert np.abs(shown(data) - expected).max() <= 1
    assert shown(data)[0, 0].min() == 255


@pytest.mark.parametrize(("dtype", "most"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
def test_premultiplied_samples_are_divided_by_their_alpha(photometric: str, dtype: str, most: int) -> None:
    colors = np.array([[[0, 0, 0], [1, 1, 1]], [[0.5, 0.25, 1], [0.2, 0.4, 0.6]]])
    colors = colors if photometric == "rgb" else colors[..., :1]
    alpha = np.array([[1, 1], [0.5, 0.8]])
    stored = np.dstack([colors * alpha[..., None], alpha]) * most
    stored = stored.astype(dtype) if dtype == "float32" else np.rint(stored).astype(dtype)
    data = tiff(stored, photometric=photometric, planarconfig="contig", extrasamples=["assocalpha"])
    level = 1 - colors if photometric == "miniswhite" else colors
    expected = 255 * (level * alpha[..., None] + 1 - alpha[..., None])
    expected = expected if photometric == "rgb" else expected[..., 0]
    assert np.abs(shown(data) - expected).max() <= 2


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_palettes_ink_and_lab_of_tifffile(dtype: str) -> None:
    wide = 1 if dtype == "uint8" else 257
    index = np.arange(48).reshape(6, 8)
    colormap = np.zeros((3, 256 if dtype == "uint8" else 65536), np.uint16)
    colormap[:, :48] = np.arange(144).reshape(3, 48) * 300
    found = shown(tiff(index.astype(dtype), photometric="palette", colormap=colormap))
    assert np.array_equal(found, (colormap[:, index] >> 8).transpose(1, 2, 0))
    ink = (np.arange(48 * 4).reshape(6, 8, 4) % 256).astype(np.int64)
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    for layout in ("contig", "separate"):
        stored = (ink * wide).astype(dtype)
        stored = stored if layout == "contig" else np.moveaxis(stored, 2, 0)
        data = tiff(stored, photometric="separated", planarconfig=layout)
        assert np.abs(shown(data) - expected).max() <= 1
    covered = np.dstack([ink * wide, np.full((6, 8), 0)]).astype(dtype)
    assert shown(tiff(covered, photometric="separated", extrasamples=["unassalpha"])).min() == 255


# Against the white of D50, as TIFF and ICC profiles have it.
LAB = np.array([[[100, 0, 0], [0, 0, 0]], [[54, 81, 70], [30, 68, -112]], [[88, -79, 81], [50, 0, 0]]])
SRGB = np.array([[[255, 255, 255], [0, 0, 0]], [[255, 0, 0], [0, 0, 255]], [[0, 255, 0], [119, 119, 119]]])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("kind", ["cielab", "icclab"])
@pytest.mark.parametrize("alpha", [False, True])
def test_lab_in_both_encodings_with_and_without_alpha(kind: str, dtype: str, alpha: bool) -> None:
    wide = 1 if dtype == "uint8" else 256
    most = 255 if dtype == "uint8" else 65280 if kind == "icclab" else 65535
    stored = np.rint(LAB * [most / 100, wide, wide] + [0, *(128 * wide * (kind == "icclab"),) * 2]).astype(np.int64)
    stored = stored.astype(dtype)
    if alpha:
        stored = np.dstack([stored, np.full((3, 2), np.iinfo(dtype).max, dtype)])
    options = {"extrasamples": ["unassalpha"]} if alpha else {}
    assert np.abs(shown(tiff(stored, photometric=kind, planarconfig="contig", **options)) - SRGB).max() <= 26


def test_a_transparent_value_of_sixteen_bits_has_no_say() -> None:
    values = np.array([[100, 4000, 8000]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", transparency=100)
    data = buffer.getvalue()
    if b"tRNS" not in data:
        chunk = b"tRNS" + struct.pack(">H", 100)
        chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
        at = data.index(b"IDAT") - 4
        data = data[:at] + chunk + data[at:]
    assert shown(data).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_declared_no_data_value_of_eight_bits_is_black(mode: str, compression: str | None) -> None:
    picture = Image.fromarray(np.array([[255, 200], [255, 10]], np.uint8)).convert(mode)
    picture.putpixel((0, 1), 255 if mode == "L" else (255, 7, 255))
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF", tiffinfo={42113: "255"}, compression=compression)
    found = shown(buffer.getvalue())
    assert found[0, 0].max() == 0
    assert found[0, 1].min() == 200
    assert found[1, 0].max() == (0 if mode == "L" else 255)


def test_what_is_no_number_costs_itself() -> None:
    values = ramp("float32")
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    found = shown(tiff(values))
    assert found[0, :3].tolist() == [0, 255, 0]
    assert np.abs(found - ruled(values)).max() <= 1
    declared = ramp("float32")
    declared[2, 2] = -9999
    told = shown(tiff(declared, extratags=[(42113, "s", 0, "-9999", True)]))
    assert told[2, 2] == 0
    assert told.mean() > 100
    undeclared = ramp("float32")
    undeclared[2, 2] = -3.4e38
    assert np.array_equal(shown(tiff(undeclared)), told)
    with pytest.raises(ImageError, match="no finite value"):
        decode(tiff(np.full((4, 4), np.nan, np.float32)))
    assert shown(tiff(ramp("float32"), photometric="miniswhite"))[0, 0] == 255


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [(65535, "uint16", 255), (0, "uint16", 0), (0, "int16", 128), (0.5, "float32", 128), (7, "float32", 255)],
)
def test_a_picture_of_one_value_keeps_its_place_in_its_type(value: float, dtype: str, expected: int) -> None:
    assert set(shown(tiff(np.full((4, 4), value, dtype))).ravel()) == {expected}


def test_twelve_bits_in_sixteen_are_stretched_in_color_and_beside_alpha() -> None:
    values = (np.arange(16 * 16 * 3, dtype=np.uint16) * 5).reshape(16, 16, 3)
    assert values.max() < 4096
    assert np.abs(shown(png(values)) - ruled(values)).max() <= 1
    grey = np.dstack([values[..., 0], np.full((16, 16), 65535, np.uint16)])
    assert np.abs(shown(png(grey)) - ruled(values[..., 0])).max() <= 1
    four = np.dstack([values, np.full((16, 16), 65535, np.uint16)])
    assert np.abs(shown(png(four)) - ruled(values)).max() <= 1
    header = b"P6\n16 16\n65535\n"
    assert np.abs(shown(header + values.astype(">u2").tobytes()) - ruled(values)).max() <= 1


def png(values: np.ndarray) -> bytes:
    """A 16-bit PNG (H, W, 2, 3 or 4 channels), which Pillow reads and does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RAMP = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *itertools.product(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), ("PNG",)),
        *itertools.product(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"), ("TIFF",)),
        *itertools.product(("1", "L", "P", "RGB"), ("BMP", "GIF")),
        *itertools.product(("1", "L", "RGB", "I", "F"), ("PPM",)),
        *itertools.product(("L", "RGB", "RGBA"), ("WEBP", "JPEG2000")),
    ],
)
def test_every_mode_that_pillow_writes_without_loss(mode: str, kind: str) -> None:
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        written = ImageCms.profileToProfile(RAMP.convert("RGB"), *profiles, outputMode="LAB")
        assert written is not None
    elif mode == "I;16":
        written = Image.fromarray(np.asarray(RAMP).astype(np.uint16) * 100)
    else:
        written = RAMP.convert(mode)
    buffer = io.BytesIO()
    written.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    if mode in ("I", "F", "I;16"):
        expected = ruled(np.asarray(written))
    else:
        expected = np.asarray(RAMP.convert("1") if mode == "1" else RAMP).astype(float) * (255 if mode == "1" else 1)
    found = shown(buffer.getvalue())
    close = found if found.ndim == 2 else found.mean(axis=2)
    assert np.abs(close - expected).max() <= (2 if mode in ("LAB", "YCbCr") else 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_value_is_white(mode: str) -> None:
    picture = RAMP.convert(mode)
    clear = {"L": 0, "RGB": (0, 0, 0), "P": 0}[mode]
    if mode == "P":
        picture = RAMP.convert("RGB").quantize(16)
        clear = picture.getpixel((0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=clear)
    assert shown(buffer.getvalue())[0, 0].min() == 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_orientation_is_applied_once(turn: int, kind: str) -> None:
    upright = np.zeros((8, 16), np.uint8)
    upright[:4, :8] = 250
    upright[4:, :8] = 120
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[274] = turn
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(buffer, kind, exif=exif, quality=100)
    assert np.abs(shown(buffer.getvalue()).mean(axis=2) - upright).max() <= 40


def test_the_orientation_of_deep_pictures_too() -> None:
    values = ramp("uint16", 3)
    data = tiff(np.ascontiguousarray(np.rot90(values)), photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    assert np.abs(shown(data) - ruled(values)).max() <= 1


@pytest.mark.parametrize("dtype", ["bool", *INTEGERS, *FLOATS])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_numpy_arrays_are_read_by_the_same_rule(dtype: str, channels: int, tmp_path: Path) -> None:
    values = ramp("uint8", channels) > 120 if dtype == "bool" else ramp(dtype, channels)
    np.savez(tmp_path / "a.npz", pictures=np.stack([values, values]))
    data = NpzImage(as_root(str(tmp_path / "a.npz")), "pictures", 1).read()
    expected = ruled(values[..., 0] if channels == 1 else values)
    assert np.abs(shown(data) - expected).max() <= 1


def test_a_picture_without_pixels_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures=np.zeros((2, 0, 4), np.uint8))
    with pytest.raises(ImageError, match="are no picture"):
        NpzImage(as_root(str(tmp_path / "a.npz")), "pictures", 0).read()


def test_an_npz_of_something_else_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures=np.zeros((2, 4, 4), complex))
    with pytest.raises(ImageError, match="complex128"):
        NpzImage(as_root(str(tmp_path / "a.npz")), "pictures", 0).read()
    assert zipfile.is_zipfile(tmp_path / "a.npz")


def test_what_was_assumed_travels_with_a_rendered_picture() -> None:
    picture = RAMP.copy()
    picture.info[ASSUMED] = "something"
    again = decode(ppm(picture))
    assert again.info[ASSUMED] == "something"
    assert np.array_equal(np.asarray(again), np.asarray(RAMP))


def test_a_damaged_exif_turns_nothing() -> None:
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"MM\0*\0\0\0\xff")
    buffer = io.BytesIO()
    RAMP.save(buffer, "PNG", pnginfo=info)
    assert np.array_equal(shown(buffer.getvalue()), np.asarray(RAMP))
