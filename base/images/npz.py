"""Pictures in an array of an `.npz` (MedMNIST's layout), read forward, in a shard's order."""

from __future__ import annotations

import functools
import math
import threading
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from mmkd.base.errors import UnreachableError
from mmkd.base.images.pixels import picture_from, ppm
from mmkd.base.images.source import MAX_BYTES, ImageError, unreadable
from mmkd.base.places.reading import open_file, stat_file
from mmkd.base.places.remote import StorePath

# The arrays are deflated as a whole: there is no way to one picture but through those before it. Rows are asked for
# nearly in order (decode threads run a little apart), so a cursor that keeps the last ones answers all of them.
_KEPT_BYTES = 16 << 20
_KEPT_ROWS = 64
_FILES_OPEN = 4
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError)
"""Errors besides OSError that damaged archives or arrays raise."""


@dataclass(frozen=True)
class NpzImage:
    """One picture of an array (n, height, width[, 1, 3 or 4]) of numbers."""

    place: StorePath
    array: str
    """Name of the array in the archive, such as `test_images`."""
    row: int

    @property
    def path(self) -> str:
        """The file."""
        return str(self.place)

    def read(self) -> bytes:
        """Return the picture as a binary PGM or PPM; samples become 8-bit by the rule of `pixels`. Raises ImageError if
        it is missing, damaged, not a picture, or too large."""
        try:
            return _cursor(self.place, self.array, stat_file(self.place).stamp).fetch(self.row)
        except (OSError, UnreachableError) as error:
            raise unreadable(error) from error
        except DAMAGED as error:
            raise ImageError("damaged npz") from error


def array_header(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
    """Return the stream behind an array's header, its shape, and its dtype. Raises KeyError if the archive has no such
    array; ValueError if it is not an array in C order."""
    stream = archive.open(f"{name}.npy")
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(stream)
    if fortran and len(shape) > 1:
        raise ValueError(f"{name} is in Fortran order")
    return stream, shape, dtype


class _Cursor:
    """A place in one array that moves forwards; a row that was passed and dropped starts over from the first."""

    def __init__(self, file: IO[bytes], array: str) -> None:
        self.archive = zipfile.ZipFile(file)
        self.array = array
        self.lock = threading.Lock()
        self.kept: OrderedDict[int, bytes] = OrderedDict()
        self._rewind()

    def _rewind(self) -> None:
        self.stream, self.shape, dtype = array_header(self.archive, self.array)
        if dtype.kind not in "buif" or len(self.shape) not in (3, 4) or self.shape[3:] not in ((), (1,), (3,), (4,)):
            raise ImageError(f"array of {dtype} {self.shape} holds no pictures")
        self.dtype = dtype
        self.row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        if self.row_bytes > MAX_BYTES:
            raise ImageError(f"larger than {MAX_BYTES >> 20} MB")
        self.next_row = 0

    def fetch(self, row: int) -> bytes:
        """Return the row's picture. Raises ImageError if there is no such row, or the array ends before it."""
        with self.lock:
            if row >= self.shape[0]:
                raise ImageError("damaged npz")
            if row not in self.kept and row < self.next_row:
                self._rewind()
            while row not in self.kept:
                pixels = self.stream.read(self.row_bytes)
                if len(pixels) < self.row_bytes:
                    raise ImageError("damaged npz")
                self.kept[self.next_row] = pixels
                self.next_row += 1
                while len(self.kept) > max(_KEPT_ROWS, _KEPT_BYTES // max(1, self.row_bytes)):
                    self.kept.popitem(last=False)
            values = np.frombuffer(self.kept[row], self.dtype).reshape(self.shape[1:])
        alpha = values[..., 3] if values.shape[2:] == (4,) else None
        return ppm(picture_from(values[..., :3] if alpha is not None else values, alpha=alpha))


@functools.lru_cache(maxsize=_FILES_OPEN)
def _cursor(place: StorePath, array: str, stamp: str) -> _Cursor:
    return _Cursor(open_file(place), array)
