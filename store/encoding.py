"""Storage of a teacher's features in arrays. `float16` and `float32` are the values themselves. `int8` keeps a row as
8-bit codes and one float32 scale: value = code * scale, with scale = max|value| / 127 of the row (symmetric "absmax"
quantization, Dettmers et al. 2022, arXiv:2208.07339, section 2, row by row), NaN for a missing row."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.store.hierarchy import Document
from mmkd.store.layout import Encoding, Tower, teacher_group

INT8_MAX = 127
"""Codes are -127 to 127; -128 is not used, so that a vector and its negative have negative codes."""

_DECODED = 1e-3
"""Largest distance from a whole code in a row that may be decoded int8: rounding in float32 stays far below."""


class CosineError(Document):
    """Loss of an encoding: 1 - cosine between a feature and its decoded form, over the sound rows."""

    mean: float
    worst: float


def value_type(encoding: Encoding) -> np.dtype[np.floating[Any]]:
    """Return the float type that holds every value of an encoding: float32 for int8."""
    return np.dtype(np.float16 if encoding == "float16" else np.float32)


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of a teacher."""

    name: str
    """Folder below the teacher's group: `image`, `image_scale`, `text`, `text_scale` or `valid`."""
    dtype: str
    width: int | None
    """Second axis; None for one number per row."""

    @property
    def fill(self) -> float:
        return float("nan") if self.dtype.startswith("float") else 0

    @property
    def stored(self) -> np.dtype[Any]:
        """As it lies in files: little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    def document(self, slug: str) -> str:
        return f"{teacher_group(slug)}/{self.name}/zarr.json"

    def pack(self, slug: str, number: int) -> str:
        """Return the path of a pack inside the store, by Zarr's default key encoding."""
        return f"{teacher_group(slug)}/{self.name}/c/{number}{'' if self.width is None else '/0'}"

    def loose(self, slug: str, shard: int) -> str:
        """Return the path of one shard's chunk until it is packed."""
        return f"{teacher_group(slug)}/{self.name}/loose/{shard:05d}"

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    def chunk_bytes(self, per_shard: int) -> int:
        return per_shard * (self.width or 1) * np.dtype(self.dtype).itemsize


VALID = ArraySpec("valid", "uint8", None)
"""Soundness bits of every teacher."""


def tower_arrays(tower: Tower, encoding: Encoding, dim: int) -> tuple[ArraySpec, ...]:
    """Return the values, and for int8 their scales."""
    values = ArraySpec(tower, encoding, dim)
    return (values, ArraySpec(f"{tower}_scale", "float32", None)) if encoding == "int8" else (values,)


def encode_rows(
    features: NDArray[np.floating[Any]], sound: NDArray[np.bool_], encoding: Encoding
) -> tuple[list[NDArray[Any]], NDArray[np.bool_]]:
    """Encode features (rows, D) of any float type; rows that are not `sound`, bool (rows,), may hold anything. Returns
    the arrays of `tower_arrays`, and the rows that are sound in them: a value that does not fit (beyond 65504 in
    float16) or a row that becomes zero makes its row missing. Decoded values are encoded to the same values again."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore"):
        if encoding != "int8":
            stored = features.astype(encoding, copy=True)
            norms = np.linalg.norm(stored.astype(np.float64 if encoding == "float32" else np.float32), axis=1)
            good = sound & np.isfinite(norms) & (norms > 0)
            stored[~good] = np.nan
            return [stored], good
        values = features.astype(np.float32)
        scale = np.abs(values).max(axis=1, initial=0) / np.float32(INT8_MAX)
        # A subnormal scale has few bits: codes would be inexact.
        good = sound & np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)
        scale[~good] = np.nan
        codes = np.zeros(values.shape, dtype=np.int8)
        quotients = values[good] / scale[good, None]
        codes[good] = np.clip(np.rint(quotients), -INT8_MAX, INT8_MAX)
        # Rows that were codes times a scale before: (127 * scale) / 127 may be the float32 beside that scale.
        decoded = np.flatnonzero(good)[np.abs(quotients - codes[good]).max(axis=1, initial=0) < _DECODED]
        for aside in (np.float32(0), np.float32(np.inf)):
            other = np.nextafter(scale[decoded], aside)
            exact = (codes[decoded] * other[:, None] == values[decoded]).all(axis=1)
            exact &= (codes[decoded] * scale[decoded, None] != values[decoded]).any(axis=1)
            scale[decoded[exact]] = other[exact]
    return [codes, scale], good


def decode_rows(arrays: list[NDArray[Any]]) -> NDArray[np.floating[Any]]:
    """Return values of the arrays of `tower_arrays`: themselves, or float32 codes times scale; NaN where missing."""
    if len(arrays) == 1:
        return arrays[0]
    codes, scale = arrays
    return np.asarray(codes.astype(np.float32) * scale[..., None].astype(np.float32))


def all_errors(parts: Iterable[tuple[CosineError | None, int]]) -> CosineError:
    """Return the error over parts of a known number of sound rows each; None where there is none."""
    known = [(error, rows) for error, rows in parts if error is not None]
    mean = sum(error.mean * rows for error, rows in known) / max(sum(rows for _, rows in known), 1)
    return CosineError(mean=float(f"{mean:.2e}"), worst=max((error.worst for error, _ in known), default=0.0))


def cosine_error(
    features: NDArray[np.floating[Any]], decoded: NDArray[np.floating[Any]], sound: NDArray[np.bool_]
) -> CosineError:
    """Return 1 - cosine of sound rows with their decoded form, mean and worst (0 without one), to three digits: sums
    that differ in the last bit between machines write the same bytes."""
    if not sound.any():
        return CosineError(mean=0.0, worst=0.0)
    left, right = features[sound].astype(np.float64), decoded[sound].astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    errors = np.maximum(1 - (left * right).sum(axis=1) / norms, 0)
    return CosineError(mean=float(f"{errors.mean():.2e}"), worst=float(f"{errors.max():.2e}"))
