"""DICOM to 8-bit pictures: modality transform, window, photometric interpretation, one frame of many. Needs pydicom.

Of a multi-frame object without a named frame the middle one is shown: a cine loop or a stack has its
subject there. A header that is odd beside sound pixels is read as far as it can be, and the picture says what was
assumed. Neither reasons nor assumptions quote the file: its text may name a patient.
"""

from __future__ import annotations

import functools
import io
import logging
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mmkd.base.errors import UnreachableError
from mmkd.base.images.pixels import ASSUMED, is_dicom, picture_from, ppm
from mmkd.base.images.source import MAX_BYTES, MAX_PIXELS, FileImage, ImageError, unreadable
from mmkd.base.places.reading import stat_file
from mmkd.base.places.remote import StorePath

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_OF_INTEGERS = ("PixelRepresentation", "BitsStored", "HighBit")
# What pydicom and the decoders below it raise on damaged or hostile files.
FAULTS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RuntimeError),
    *(TypeError, ValueError, struct.error, Warning, Image.DecompressionBombError, pydicom.errors.InvalidDicomError),
)
# pydicom quotes offending values in warnings and log lines, and a value may be a patient's name.


@dataclass(frozen=True)
class DicomFrame:
    """One frame of a multi-frame object."""

    place: StorePath
    frame: int
    """From 0."""

    @property
    def path(self) -> str:
        """The file."""
        return str(self.place)

    def read(self) -> bytes:
        """The rendered frame as PPM: its checksum is the frame's, not that of the whole object.

        Raises:
            ImageError: missing, not DICOM, or without this frame.
        """
        try:
            dataset = _dataset(self.place, stat_file(self.place).stamp)
        except (OSError, UnreachableError) as error:
            raise unreadable(error) from error
        return ppm(render(dataset, self.frame))


# Frames of one file follow each other: two parsed files are enough for threads that run a little apart.
@functools.lru_cache(maxsize=2)
def _dataset(place: StorePath, stamp: str) -> Dataset:
    return parse(FileImage(place).read())


def decode_dicom(data: bytes) -> Image.Image:
    """The picture of a single-frame object, the middle frame of others.

    Raises:
        ImageError: damaged, without pixels, in an encoding that no installed decoder knows, or too large.
    """
    return render(parse(data), None)


def parse(data: bytes, header_of: list[str] | None = None) -> Dataset:
    """Parse a file, with or without the preamble of Part 10, without decoding its pixels.

    Args:
        data: the file, or its beginning when only a header is wanted.
        header_of: the tags that are wanted of the header; everything when not given.

    Raises:
        ImageError: not DICOM, or damaged.
    """
    _hush()
    if len(data) > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES >> 20} MB")
    if not is_dicom(data):
        raise ImageError("not DICOM")
    # Inflating is not bounded inside pydicom, and a few kB can become all of the memory.
    if _DEFLATED in data:
        raise ImageError("DICOM: deflated transfer syntax is not read")
    tags = None if header_of is None else list(header_of)
    try:
        return pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=tags is not None, specific_tags=tags)
    except (*FAULTS, RecursionError):
        raise ImageError("DICOM: damaged header") from None


def middle_frame(frames: int) -> int:
    """The frame that stands for a loop or stack: of an even number, the later of the two in the middle."""
    return frames // 2


def render(dataset: Dataset, frame: int | None) -> Image.Image:
    """One frame as an 8-bit `L` or `RGB` picture; `info["assumed"]` says what was assumed where a header was odd.

    Grey: stored values -> modality LUT or rescale -> VOI LUT, else the first window that can be used by its function
    -> inverted for MONOCHROME1 (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2). Without either, and in color, the rule of
    `pixels`; palettes are scaled by the bits of their entries.

    Raises:
        ImageError: as `decode_dicom`, or there is no such frame.
    """
    _hush()
    try:
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ImageError("DICOM: no pixels")
        if int(dataset.Rows) * int(dataset.Columns) > MAX_PIXELS:
            raise ImageError(f"more than {MAX_PIXELS:,} pixels")
        assumed = _complete(dataset)
        frames = int(_number(dataset, "NumberOfFrames") or 1)
        wanted = middle_frame(frames) if frame is None else frame
        if wanted >= frames:
            raise ImageError("DICOM: no such frame")
        shown = _render(dataset, wanted, assumed)
    except FAULTS as error:
        # Only this pydicom message says that a decoder is missing; everything else is a damaged file.
        if "missing dependencies" in str(error) or "no pixel data decoders" in str(error).lower():
            name = pydicom.uid.UID(dataset.file_meta.TransferSyntaxUID).name
            raise ImageError(f"DICOM: no decoder installed for {name}") from None
        raise ImageError("DICOM: damaged pixels") from None
    if assumed:
        shown.info[ASSUMED] = "DICOM: " + ", ".join(dict.fromkeys(assumed))
    return shown


def _complete(dataset: Dataset) -> list[str]:
    """Fill in what decoding asks for and the object leaves out; returns what was assumed."""
    assumed = []
    if not isinstance(getattr(dataset, "file_meta", None), FileMetaDataset):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        if bytes(dataset.get("PixelData") or b"")[:4] == b"\xfe\xff\x00\xe0":
            raise ImageError("DICOM: compressed pixels without a transfer syntax")
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        assumed.append("no transfer syntax, taken for little endian")
    samples = _number(dataset, "SamplesPerPixel") or 1
    stored = _number(dataset, "BitsAllocated")
    usual: dict[str, Any] = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2" if samples == 1 else "RGB",
        "PixelRepresentation": 0,
        "BitsStored": stored,
        "HighBit": None if stored is None else int(_number(dataset, "BitsStored") or stored) - 1,
        **({"PlanarConfiguration": 0} if samples > 1 else {}),
    }
    floats = "PixelData" not in dataset
    for name, value in usual.items():
        if dataset.get(name) in (None, "") and value is not None and not (floats and name in _OF_INTEGERS):
            setattr(dataset, name, int(value) if isinstance(value, float) else value)
            assumed.append(f"no {name}, taken for {value:g}" if isinstance(value, float) else f"no {name}, {value}")
    if "NumberOfFrames" in dataset and (_number(dataset, "NumberOfFrames") or 0) < 1:
        dataset.NumberOfFrames = 1
        assumed.append("NumberOfFrames below 1")
    return assumed


def _render(dataset: Dataset, frame: int, assumed: list[str]) -> Image.Image:
    pixels = pixel_array(dataset, index=frame)
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return Image.fromarray(_to_eight_bits(pixels, 8 if pixels.dtype == np.uint8 else 16), "RGB")
    if pixels.ndim == 3:
        return picture_from(pixels)
    return _grey(dataset, frame, pixels, kind == "MONOCHROME1", assumed)


def _to_eight_bits(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return pixels.clip(0, 255).astype(np.uint8)
    scaled = pixels.astype(np.float64) * (255.0 / ((1 << bits) - 1))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _grey(dataset: Dataset, frame: int, stored: NDArray[Any], inverted: bool, assumed: list[str]) -> Image.Image:
    values = _rescaled(_group(dataset, frame, "PixelValueTransformationSequence"), stored, assumed)
    absent = _padding(dataset, stored)
    group = _group(dataset, frame, "FrameVOILUTSequence")
    shown = _looked_up(group, values, assumed)
    if shown is None:
        shown = _windowed(group, values, assumed)
    if shown is None:
        same = values.dtype == stored.dtype and bool((values == stored).all())
        most = 1 << int(_number(dataset, "BitsStored") or 8 * stored.itemsize)
        low = -(most // 2) if stored.dtype.kind == "i" else 0
        limits = (float(low), float(low + most - 1)) if same and stored.dtype.kind != "f" else None
        # Eight unsigned bits and no transform: as everywhere, they are what they are.
        plain = limits is not None and stored.dtype == np.uint8 and most == 1 << 8
        return picture_from(stored if plain else values, white_is_zero=inverted, absent=absent, limits=limits)
    return picture_from(shown, white_is_zero=inverted, absent=absent)


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Pixels of the padding value, or between it and the range's limit."""
    value, limit = _number(dataset, "PixelPaddingValue"), _number(dataset, "PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = [value, value if limit is None else limit]
    # A value may have been written as unsigned where pixels are signed.
    if stored.dtype.kind == "i":
        most = 1 << 8 * stored.itemsize
        ends = [end - most if end >= most / 2 else end for end in ends]
    return np.asarray((stored >= min(ends)) & (stored <= max(ends)))


def _rescaled(group: Dataset, stored: NDArray[Any], assumed: list[str]) -> NDArray[Any]:
    if group.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, group))
    slope, intercept = _number(group, "RescaleSlope"), _number(group, "RescaleIntercept")
    if slope is None and ("RescaleSlope" in group or intercept is not None):
        assumed.append("no value in RescaleSlope, taken for 1")
    elif slope == 0:
        assumed.append("RescaleSlope 0, taken for 1")
    if intercept is None and ("RescaleIntercept" in group or slope is not None):
        assumed.append("no value in RescaleIntercept, taken for 0")
    slope, intercept = slope or 1.0, intercept or 0.0
    return stored if (slope, intercept) == (1.0, 0.0) else stored.astype(np.float64) * slope + intercept


def _windowed(group: Dataset, values: NDArray[Any], assumed: list[str]) -> NDArray[np.uint8] | None:
    """Values through the first window that can be used; None where there is none."""
    centers, widths = _numbers(group, "WindowCenter"), _numbers(group, "WindowWidth")
    function = str(group.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        assumed.append("VOILUTFunction that the standard does not have, taken for LINEAR")
        function = "LINEAR"
    for number, (center, width) in enumerate(zip(centers, widths, strict=False)):
        if center is None or width is None or width <= 0 or not np.isfinite([center, width]).all():
            continue
        if number:
            assumed.append(f"window {number + 1}, as those before cannot be used")
        if width < 1 and function == "LINEAR":
            assumed.append("WindowWidth below 1, taken for LINEAR_EXACT")
            function = "LINEAR_EXACT"
        share = windowed(np.asarray(values, dtype=np.float64), center, width, function)
        return np.rint(np.nan_to_num(255.0 * share)).astype(np.uint8)
    if any(name in group for name in ("WindowCenter", "WindowWidth")):
        assumed.append("no usable window, own range")
    return None


def windowed(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """Values 0 to 1 after a window (DICOM PS3.3 C.11.2.1.2.1, C.11.2.1.3); of LINEAR the width is at least 1."""
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp((-4.0 * (values - center) / width).clip(-700, 700))))
    if function == "LINEAR_EXACT":
        return ((values - center) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > center - 0.5).astype(np.float64)
    return ((values - (center - 0.5)) / (width - 1.0) + 0.5).clip(0, 1)


def _looked_up(group: Dataset, values: NDArray[Any], assumed: list[str]) -> NDArray[np.uint8] | None:
    """Values through the first VOI LUT (DICOM PS3.3 C.11.2.1.1), entries over their own bits; None without one."""
    if not group.get("VOILUTSequence"):
        return None
    item = group.VOILUTSequence[0]
    descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
    if descriptor is None or len(descriptor) != 3 or data is None or not len(data):
        assumed.append("VOI LUT without content")
        return None
    count, first, bits = (int(value) for value in descriptor)
    count = count or 1 << 16
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype="<u2" if len(data) >= 2 * count else "u1")
    table = np.asarray(data)
    # A descriptor's first value is signed where pixels are, but may have been read as unsigned.
    first = first - (1 << 16) if first >= 1 << 15 and values.min() < 0 else first
    index = (np.rint(values).astype(np.int64) - first).clip(0, count - 1)
    return _to_eight_bits(table[index], bits)


def _group(dataset: Dataset, frame: int, name: str) -> Dataset:
    """Where an enhanced object keeps these attributes: its frame's group, the shared one, or the object itself."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for item in (*per_frame[frame : frame + 1], *shared[:1]):
        if item.get(name):
            group: Dataset = item[name].value[0]
            return group
    return dataset


def _numbers(dataset: Dataset, name: str) -> list[float | None]:
    """Values of an attribute; None for one that is no number, an empty list where there is none."""
    try:
        value = dataset.get(name)
    except (ValueError, TypeError, OverflowError):
        return [None]
    if value is None or isinstance(value, str | int | float):
        value = [] if value is None or value == "" else [value]
    found: list[float | None] = []
    for one in value if isinstance(value, Iterable) else [value]:
        try:
            found.append(float(one))
        except (ValueError, TypeError):
            found.append(None)
    return found


def _number(dataset: Dataset, name: str) -> float | None:
    return next(iter(_numbers(dataset, name)), None)


def _hush() -> None:
    # Each time, because whoever sets filters or loggers up again (pytest and Dask do) would let a name through.
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").disabled = True
