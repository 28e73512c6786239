"""DICOM to 8-bit pictures: modality transform, window, photometric interpretation, one frame of many. Needs pydicom.

Of a multi-frame object without a named frame the middle one is shown: a cine loop or a stack has its
subject there, and begins and ends beside it. Reasons never quote the file: its text may name a patient.
"""

from __future__ import annotations

import functools
import io
import logging
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

from mmkd.base.images.source import MAX_BYTES, MAX_PIXELS, FileImage, ImageError, unreadable
from mmkd.base.places.place import Place

_DEFLATED = b"1.2.840.10008.1.2.1.99"
# What pydicom and the decoders below it raise on damaged or hostile files.
FAULTS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RuntimeError),
    *(TypeError, ValueError, struct.error, Warning, Image.DecompressionBombError, pydicom.errors.InvalidDicomError),
)
# pydicom quotes offending values in warnings and log lines, and a value may be a patient's name.


@dataclass(frozen=True)
class DicomFrame:
    """One frame of a multi-frame object."""

    place: Place
    frame: int
    """From 0."""

    @property
    def path(self) -> str:
        """The file."""
        return str(self.place)

    def read(self) -> bytes:
        """The rendered frame as PPM: its checksum is that of the frame, not of the loop it stands in.

        Raises:
            ImageError: missing, not DICOM, or without this frame.
        """
        try:
            dataset = _dataset(self.place, self.place.listed().stamp)
        except OSError as error:
            raise unreadable(error) from error
        buffer = io.BytesIO()
        render(dataset, self.frame).save(buffer, "PPM")
        return buffer.getvalue()


# Frames of one file follow each other: two parsed files are enough for threads that run a little apart.
@functools.lru_cache(maxsize=2)
def _dataset(place: Place, stamp: str) -> Dataset:
    return parse(FileImage(place).read())


def decode_dicom(data: bytes) -> Image.Image:
    """The picture of a single-frame object, the middle frame of others.

    Raises:
        ImageError: damaged, without pixels, in an encoding that no installed decoder knows, or too large.
    """
    return render(parse(data), None)


def parse(data: bytes, header_of: list[str] | None = None) -> Dataset:
    """Parse a Part 10 file without decoding its pixels.

    Args:
        data: the file, or its beginning when only a header is wanted.
        header_of: the tags that are wanted of the header; everything when not given.

    Raises:
        ImageError: not DICOM, or damaged.
    """
    _hush()
    if len(data) > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES >> 20} MB")
    if data[128:132] != b"DICM":
        raise ImageError("not DICOM")
    # Inflating is not bounded inside pydicom, and a few kB can become all of the memory.
    if _DEFLATED in data:
        raise ImageError("DICOM: deflated transfer syntax is not read")
    try:
        if header_of is not None:
            return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=list(header_of))
        return pydicom.dcmread(io.BytesIO(data))
    except (*FAULTS, RecursionError):
        raise ImageError("DICOM: damaged header") from None


def middle_frame(frames: int) -> int:
    """The frame that stands for a loop or stack: of an even number, the later of the two in the middle."""
    return frames // 2


def render(dataset: Dataset, frame: int | None) -> Image.Image:
    """One frame as an 8-bit `L` or `RGB` picture.

    Grey: stored values -> modality LUT or rescale -> VOI LUT, else the first window by its function, else the
    frame's own range without padding -> inverted for MONOCHROME1 (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2).
    Colour: palette, YBR and RGB become RGB; more than 8 bits a sample are scaled by the bits stored.

    Raises:
        ImageError: as `decode_dicom`, or there is no such frame.
    """
    _hush()
    try:
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ImageError("DICOM: no pixels")
        if int(dataset.Rows) * int(dataset.Columns) > MAX_PIXELS:
            raise ImageError(f"more than {MAX_PIXELS:,} pixels")
        frames = int(dataset.get("NumberOfFrames") or 1)
        wanted = middle_frame(frames) if frame is None else frame
        if wanted >= frames:
            raise ImageError("DICOM: no such frame")
        return _render(dataset, wanted)
    except FAULTS as error:
        # Only this pydicom message says that a decoder is missing; everything else is a damaged file.
        if "missing dependencies" in str(error) or "no pixel data decoders" in str(error).lower():
            name = pydicom.uid.UID(dataset.file_meta.TransferSyntaxUID).name
            raise ImageError(f"DICOM: no decoder installed for {name}") from None
        raise ImageError("DICOM: damaged pixels") from None


def _render(dataset: Dataset, frame: int) -> Image.Image:
    pixels = pixel_array(dataset, index=frame)
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return Image.fromarray(_to_eight_bits(pixels, 8 if pixels.dtype == np.uint8 else 16), "RGB")
    if pixels.ndim == 3:
        return Image.fromarray(_to_eight_bits(pixels, int(dataset.BitsStored)), "RGB")
    grey = _window(dataset, frame, pixels)
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey, "L")


def _to_eight_bits(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return pixels.astype(np.uint8)
    scaled = pixels.astype(np.float64) * (255.0 / ((1 << bits) - 1))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _window(dataset: Dataset, frame: int, stored: NDArray[Any]) -> NDArray[np.uint8]:
    transform = _group(dataset, frame, "PixelValueTransformationSequence")
    values = np.asarray(apply_modality_lut(stored, transform), dtype=np.float64)
    group = _group(dataset, frame, "FrameVOILUTSequence")
    if group.get("VOILUTSequence"):
        return _looked_up(group.VOILUTSequence[0], values)
    centre, width = (_first(group.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        return _own_range(values, stored, dataset.get("PixelPaddingValue"))
    function = str(group.get("VOILUTFunction") or "LINEAR").upper()
    return np.rint(255.0 * windowed(values, centre, width, function)).astype(np.uint8)


def windowed(values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """Values 0 to 1 after a window (DICOM PS3.3 C.11.2.1.2.1, C.11.2.1.3).

    Raises:
        ValueError: a width that the function does not allow.
    """
    if width < 1 if function == "LINEAR" else width <= 0:
        raise ValueError("window width")
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp((-4.0 * (values - centre) / width).clip(-700, 700))))
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return ((values - (centre - 0.5)) / (width - 1.0) + 0.5).clip(0, 1)


def _looked_up(item: Dataset, values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The first VOI LUT (DICOM PS3.3 C.11.2.1.1): entries over their own bits."""
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 1 << 16
    if isinstance(item.LUTData, bytes):
        table = np.frombuffer(item.LUTData, dtype="<u2" if len(item.LUTData) >= 2 * count else "u1")
    else:
        table = np.asarray(item.LUTData)
    # A descriptor's first value is signed where pixels are, but may have been read as unsigned.
    first = first - (1 << 16) if first >= 1 << 15 and values.min() < 0 else first
    index = (np.rint(values).astype(np.int64) - first).clip(0, count - 1)
    return _to_eight_bits(table[index], bits) if bits != 8 else table[index].clip(0, 255).astype(np.uint8)


def _own_range(values: NDArray[np.float64], stored: NDArray[Any], padding: object) -> NDArray[np.uint8]:
    inside = np.ones(values.shape, dtype=bool) if padding is None else stored != padding
    if not inside.any() or not np.isfinite(values[inside]).all():
        raise ValueError("no values")
    low, high = float(values[inside].min()), float(values[inside].max())
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    return np.rint((values.clip(low, high) - low) * (255.0 / (high - low))).astype(np.uint8)


def _group(dataset: Dataset, frame: int, name: str) -> Dataset:
    """Where an enhanced object keeps these attributes: its frame's group, the shared one, or the object itself."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for item in (*per_frame[frame : frame + 1], *shared[:1]):
        if item.get(name):
            group: Dataset = item[name].value[0]
            return group
    return dataset


def _first(value: Any) -> float | None:
    """Of several windows the first: DICOM gives them no order but this."""
    if value is None or value == "":
        return None
    if isinstance(value, str | int | float):
        return float(value)
    try:
        return float(value[0]) if len(value) else None
    except TypeError:
        return float(value)


def _hush() -> None:
    # Each time, because whoever sets filters or loggers up again (pytest and Dask do) would let a name through.
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").disabled = True
