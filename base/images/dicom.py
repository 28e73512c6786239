"""DICOM to 8-bit pictures: modality transform, window, photometric interpretation, one frame of many. Needs pydicom.

Of a multi-frame object without a named frame the middle one is shown: a cine loop or a stack has its subject there. An
odd header is read as far as possible, and what was assumed recorded. Nothing quotes the file: it may name a patient.
"""

import functools
import io
import logging
import math
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mmkd.base.images.pixels import ASSUMED, is_dicom, picture_from, ppm
from mmkd.base.images.source import FileImage, ImageError, ImageSource, check_bytes, check_pixels
from mmkd.base.places.reading import stat_file
from mmkd.base.places.remote import StorePath

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_ONE_SAMPLE = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_THREE_SAMPLES = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT")
# Retired color spaces that no decoder reads; as RGB they would be wrong.
_OTHER_COLORS = ("ARGB", "CMYK", "HSV")
# What pydicom and the decoders below it raise on damaged or hostile files.
_FAULTS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RuntimeError),
    *(TypeError, ValueError, struct.error, Warning, Image.DecompressionBombError, pydicom.errors.InvalidDicomError),
)


@dataclass(frozen=True)
class DicomFrame(ImageSource):
    """One frame of a multi-frame object, rendered as PPM: its checksum is the frame's, not that of the whole object."""

    frame: int
    """Zero-based."""

    def _encoded(self) -> bytes:
        dataset, assumed = _dataset(self.place, stat_file(self.place).stamp)
        return ppm(_render(dataset, self.frame, list(assumed)))


# Frames of one file follow each other: two parsed files are enough for threads that run a little apart.
@functools.lru_cache(maxsize=2)
def _dataset(place: StorePath, stamp: str) -> tuple[Dataset, list[str]]:
    dataset = parse(FileImage(place).read())
    return dataset, _complete(dataset)


def decode_dicom(data: bytes) -> Image.Image:
    """Return the picture of a single-frame object, the middle frame of others, as 8-bit `L` or `RGB`. Gray: stored
    values -> modality LUT or rescale -> VOI LUT, else the first usable window -> inverted for MONOCHROME1 (DICOM PS3.3
    C.7.6.3, C.11.1, C.11.2). Without either, and in color, the rule of `pixels`; palettes are scaled by the bits of
    their entries. Raises ImageError if it is damaged, without pixels, too large, or no decoder knows its encoding."""
    dataset = parse(data)
    return _render(dataset, None, _complete(dataset))


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn what pydicom raises into a reason; only two of its messages say that a decoder is missing."""
    _hush()
    try:
        yield
    except _FAULTS as error:
        if "missing dependencies" in str(error) or "no pixel data decoders" in str(error).lower():
            raise ImageError("DICOM: no decoder installed for its transfer syntax") from None
        raise ImageError("DICOM: damaged pixels") from None


def parse(data: bytes, header_of: list[str] | None = None) -> Dataset:
    """Parse a file, with or without the preamble of Part 10; with `header_of`, only these tags of the header, for which
    the beginning of the file is enough. Raises ImageError if it is not DICOM or is damaged."""
    _hush()
    check_bytes(len(data))
    if not is_dicom(data):
        raise ImageError("not DICOM")
    # Inflating is not bounded inside pydicom, and a few kB can become all of the memory.
    if _DEFLATED in data:
        raise ImageError("DICOM: deflated transfer syntax is not read")
    only = header_of is not None
    try:
        return pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=only, specific_tags=header_of)
    except (*_FAULTS, RecursionError):
        raise ImageError("DICOM: damaged header") from None


def _render(dataset: Dataset, frame: int | None, assumed: list[str]) -> Image.Image:
    with _reasons():
        frames = int(_number(dataset, "NumberOfFrames") or 1)
        wanted = frames // 2 if frame is None else frame
        if wanted >= frames:
            raise ImageError("DICOM: no such frame")
        pixels = _stored_values(dataset, wanted, assumed)
        kind = str(dataset.PhotometricInterpretation)
        if kind == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
            shown = Image.fromarray(_to_eight_bits(pixels, 8 if pixels.dtype == np.uint8 else 16))
        elif pixels.ndim == 3:
            shown = picture_from(pixels)
        else:
            shown = _gray(dataset, wanted, pixels, kind == "MONOCHROME1", assumed)
    if assumed:
        shown.info[ASSUMED] = "DICOM: " + ", ".join(dict.fromkeys(assumed))
    return shown


@_reasons()
def _complete(dataset: Dataset) -> list[str]:
    """Fill in elements that decoding needs and the object lacks or misstates; return the assumptions."""
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageError("DICOM: no pixels")
    check_pixels(int(dataset.Rows) * int(dataset.Columns))
    assumed: list[str] = []
    if not isinstance(getattr(dataset, "file_meta", None), FileMetaDataset):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        if bytes(dataset.get("PixelData") or b"")[:4] == b"\xfe\xff\x00\xe0":
            raise ImageError("DICOM: compressed pixels without a transfer syntax")
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        assumed.append(f"no transfer syntax, taken for {'little' if little else 'big'} endian")
    if "NumberOfFrames" in dataset and (_number(dataset, "NumberOfFrames") or 0) < 1:
        _assume(dataset, assumed, "NumberOfFrames", 1, "NumberOfFrames below 1")
    _complete_color(dataset, assumed)
    if "PixelData" not in dataset:
        return assumed
    native, length = not dataset.file_meta.TransferSyntaxUID.is_compressed, len(dataset.PixelData or b"")
    frames = int(_number(dataset, "NumberOfFrames") or 1)
    values = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel) * frames
    if _number(dataset, "BitsAllocated") is None and native and values and length // values in (1, 2, 4):
        _assume(dataset, assumed, "BitsAllocated", 8 * (length // values))
    allocated = int(dataset.BitsAllocated)
    if native and dataset.PhotometricInterpretation == "YBR_FULL_422" and length >= values * allocated // 8:
        _assume(dataset, assumed, "PhotometricInterpretation", "YBR_FULL", "YBR_FULL_422 with all its samples")
    if _number(dataset, "PixelRepresentation") not in (0, 1):
        _assume(dataset, assumed, "PixelRepresentation", 0)
    if (stored := _number(dataset, "BitsStored")) is None or not 1 <= stored <= allocated:
        _assume(dataset, assumed, "BitsStored", allocated, "" if stored is None else "BitsStored that does not fit")
    return assumed


def _assume(dataset: Dataset, assumed: list[str], name: str, value: object, why: str = "") -> None:
    setattr(dataset, name, value)
    assumed.append(f"{why or f'no {name}'}, taken for {value}")


def _complete_color(dataset: Dataset, assumed: list[str]) -> None:
    kind = " ".join(str(dataset.get("PhotometricInterpretation") or "").upper().split())
    if _number(dataset, "SamplesPerPixel") is None:
        _assume(dataset, assumed, "SamplesPerPixel", 3 if kind in _THREE_SAMPLES else 1)
    colored = int(dataset.SamplesPerPixel) > 1
    if colored and dataset.get("PlanarConfiguration") is None:
        _assume(dataset, assumed, "PlanarConfiguration", 0)
    if kind in _OTHER_COLORS:
        raise ImageError(f"DICOM: color space {kind} is not read")
    fits = kind in (_THREE_SAMPLES if colored else _ONE_SAMPLE)
    if fits and (kind != "PALETTE COLOR" or "RedPaletteColorLookupTableDescriptor" in dataset):
        dataset.PhotometricInterpretation = kind
    else:
        why = "PhotometricInterpretation that does not fit" if kind else ""
        _assume(dataset, assumed, "PhotometricInterpretation", "RGB" if colored else "MONOCHROME2", why)


def _stored_values(dataset: Dataset, frame: int, assumed: list[str]) -> NDArray[Any]:
    """Return a frame's samples: the bits below HighBit if it is above BitsStored and used, else the low ones."""
    bits, named = int(_number(dataset, "BitsStored") or 0), _number(dataset, "HighBit")
    high = -1 if named is None else int(named)
    low: NDArray[Any] = pixel_array(dataset, index=frame)
    if "PixelData" not in dataset or high == bits - 1:
        return low
    if bits <= high < int(dataset.BitsAllocated) and not dataset.file_meta.TransferSyntaxUID.is_compressed:
        dataset.BitsStored = high + 1
        try:
            whole: NDArray[Any] = pixel_array(dataset, index=frame)
        finally:
            dataset.BitsStored = bits
        least, most = (-(1 << bits - 1), 1 << bits - 1) if whole.dtype.kind == "i" else (0, 1 << bits)
        if whole.min() < least or whole.max() >= most:
            return np.asarray(whole >> (high + 1 - bits))
    assumed.append(f"{'no HighBit' if high < 0 else 'HighBit that does not fit'}, taken for {bits - 1}")
    return low


def _to_eight_bits(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    scaled = pixels.astype(np.float64) * (255.0 / ((1 << bits) - 1))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _gray(dataset: Dataset, frame: int, stored: NDArray[Any], inverted: bool, assumed: list[str]) -> Image.Image:
    absent = _padding(dataset, stored)
    values, slope = _rescale(_group(dataset, frame, "PixelValueTransformationSequence"), stored, assumed)
    group = _group(dataset, frame, "FrameVOILUTSequence")
    if (shown := _apply_lut(group, values, assumed)) is None:
        shown = _apply_window(group, values, assumed)
    if shown is not None or slope is None:
        return picture_from(values if shown is None else shown, white_is_zero=inverted, absent=absent)
    # A line through the stored values changes nothing when they are stretched; a picture of one value keeps its place.
    inverted ^= slope < 0
    if stored.dtype.kind == "f":
        return picture_from(stored, white_is_zero=inverted, absent=absent)
    bits = int(_number(dataset, "BitsStored") or 8 * stored.itemsize)
    low = -(1 << bits - 1) if stored.dtype.kind == "i" else 0
    if bits <= 8 and not low and slope == 1:
        # Few unsigned bits keep their range, as everywhere.
        return picture_from(_to_eight_bits(stored, bits), white_is_zero=inverted, absent=absent)
    limits = (float(low), float(low + (1 << bits) - 1))
    return picture_from(stored.astype(np.int64), white_is_zero=inverted, absent=absent, limits=limits)


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Return pixels of the padding value, or between it and the range's limit."""
    value, limit = _number(dataset, "PixelPaddingValue"), _number(dataset, "PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = [value, value if limit is None else limit]
    # A value may have been written as unsigned where pixels are signed.
    if stored.dtype.kind == "i":
        most = 1 << 8 * stored.itemsize
        ends = [end - most if end >= most / 2 else end for end in ends]
    return np.asarray((stored >= min(ends)) & (stored <= max(ends)))


def _rescale(group: Dataset, stored: NDArray[Any], assumed: list[str]) -> tuple[NDArray[Any], float | None]:
    """Return values after the modality transform, and its slope; None where it is a table."""
    if group.get("ModalityLUTSequence"):
        if _table(group.ModalityLUTSequence[:1]) is not None:
            return np.asarray(apply_modality_lut(stored, group)), None
        assumed.append("modality LUT without content")
    slope, intercept = _number(group, "RescaleSlope"), _number(group, "RescaleIntercept")
    if slope is None and ("RescaleSlope" in group or intercept is not None):
        assumed.append("no value in RescaleSlope, taken for 1")
    elif slope == 0:
        assumed.append("RescaleSlope 0, taken for 1")
    if intercept is None and ("RescaleIntercept" in group or slope is not None):
        assumed.append("no value in RescaleIntercept, taken for 0")
    slope, intercept = slope or 1.0, intercept or 0.0
    return (stored if (slope, intercept) == (1.0, 0.0) else stored.astype(np.float64) * slope + intercept), slope


def _apply_window(group: Dataset, values: NDArray[Any], assumed: list[str]) -> NDArray[np.uint8] | None:
    """Return values through the first window that can be used; None where there is none."""
    centers, widths = _numbers(group, "WindowCenter"), _numbers(group, "WindowWidth")
    named = group.get("VOILUTFunction") or "LINEAR"
    function = str(named if isinstance(named, str) else named[0]).upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        assumed.append("VOILUTFunction that the standard does not have, taken for LINEAR")
        function = "LINEAR"
    for number, (center, width) in enumerate(zip(centers, widths, strict=False)):
        if center is None or width is None or width <= 0:
            continue
        if number:
            assumed.append(f"window {number + 1}, as those before cannot be used")
        if width < 1 and function == "LINEAR":
            assumed.append("WindowWidth below 1, taken for LINEAR_EXACT")
            function = "LINEAR_EXACT"
        share = window_values(np.asarray(values, dtype=np.float64), center, width, function)
        return np.rint(np.nan_to_num(255.0 * share)).astype(np.uint8)
    if any(name in group for name in ("WindowCenter", "WindowWidth")):
        assumed.append("no usable window, own range")
    return None


def window_values(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """Return values 0 to 1 after a window (DICOM PS3.3 C.11.2.1.2.1, C.11.2.1.3); of LINEAR the width is at least 1."""
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp((-4.0 * (values - center) / width).clip(-700, 700))))
    if function == "LINEAR_EXACT":
        return ((values - center) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > center - 0.5).astype(np.float64)
    return ((values - (center - 0.5)) / (width - 1.0) + 0.5).clip(0, 1)


def _apply_lut(group: Dataset, values: NDArray[Any], assumed: list[str]) -> NDArray[np.uint8] | None:
    """Return values through the first VOI LUT (PS3.3 C.11.2.1.1), entries over their own bits; None without one."""
    if not (items := group.get("VOILUTSequence")):
        return None
    if (found := _table(items)) is None:
        assumed.append("VOI LUT without content")
        return None
    table, count, first, bits = found
    if len(table) < count:
        assumed.append("VOI LUT with fewer entries than stated")
    if not 8 <= bits <= 16:
        bits = 8 if table.max() < 1 << 8 else 16
        assumed.append(f"VOI LUT without its bits, taken for {bits}")
    # A descriptor's first value is signed where pixels are, but may have been read as unsigned.
    first = first - (1 << 16) if first >= 1 << 15 and values.min() < 0 else first
    index = (np.rint(values).astype(np.int64) - first).clip(0, min(count, len(table)) - 1)
    return _to_eight_bits(table[index], bits)


def _table(items: Iterable[Dataset]) -> tuple[NDArray[Any], int, int, int] | None:
    """Return the first LUT with content: entries, their stated number, the first one's value, and bits."""
    for item in items:
        descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
        if descriptor is None or isinstance(descriptor, int) or len(descriptor) != 3 or data is None:
            continue
        count, first, bits = (int(value) for value in descriptor)
        count = count or 1 << 16
        if isinstance(data, bytes):
            data = np.frombuffer(data, dtype="<u2" if len(data) >= 2 * count else "u1")
        if (table := np.atleast_1d(np.asarray(data))).size:
            return table, count, first, bits
    return None


def _group(dataset: Dataset, frame: int, name: str) -> Dataset:
    """Return the data set with these attributes: the frame's group, the shared one, or the object itself."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for item in (*per_frame[frame : frame + 1], *shared[:1]):
        if item.get(name):
            return item[name].value[0]
    return dataset


def _numbers(dataset: Dataset, name: str) -> list[float | None]:
    """Return values of an attribute; None for one that is no finite number, an empty list where there is none."""
    try:
        value = dataset.get(name)
    except (ValueError, TypeError, OverflowError):
        return [None]
    if value is None or value == "":
        return []
    found: list[float | None] = []
    for one in value if isinstance(value, Iterable) and not isinstance(value, str) else [value]:
        try:
            number = float(one)
        except (ValueError, TypeError):
            number = math.nan
        found.append(number if math.isfinite(number) else None)
    return found


def _number(dataset: Dataset, name: str) -> float | None:
    return next(iter(_numbers(dataset, name)), None)


def _hush() -> None:
    """Silence pydicom, which quotes offending values, and a value may be a patient's name."""
    # Each time, because whoever sets filters or loggers up again (pytest and Dask do) would let a name through.
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").disabled = True
