"""Images in cells of Parquet files and in arrays of `.npz` archives (MedMNIST's layout).

Neither has a way to one image but through those before it. Rows are asked for nearly in order (decode threads run a
little apart), so a cursor that moves forwards and keeps the last rows answers all of them.
"""

import functools
import math
import threading
import zipfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmkd.base.images.pixels import picture_from, ppm
from mmkd.base.images.source import ImageError, ImageSource, check_bytes
from mmkd.base.places.reading import open_file, stat_file
from mmkd.base.places.remote import StorePath

_BATCH_ROWS, _BATCHES_KEPT = 16, 12
_ROWS_KEPT, _BYTES_KEPT = 64, 16 << 20
_FILES_OPEN = 4
DAMAGED_NPZ = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError)
"""Errors besides OSError that damaged archives or arrays raise."""


@dataclass(frozen=True)
class ParquetImage(ImageSource):
    """One cell with encoded bytes."""

    column: str
    """Dotted path of the column, such as `image.bytes`."""
    row: int
    """Row number in the file."""
    item: int | None = None
    """Index within a list cell."""

    def _encoded(self) -> bytes:
        try:
            data = _ParquetCursor(self.place, self.column, stat_file(self.place).stamp).fetch(self.row)
            if self.item is not None and data is not None:
                data = data[self.item]
                data = data.get("bytes") if isinstance(data, dict) else data
        except (OSError, KeyError, IndexError, pa.ArrowException) as error:
            # Arrow reports damaged pages as OSError too, without an errno.
            if isinstance(error, OSError) and error.strerror:
                raise
            raise ImageError("damaged Parquet") from error
        if not data:
            raise ImageError("null in Parquet" if data is None else "empty file")
        check_bytes(len(data))
        return data


@dataclass(frozen=True)
class NpzImage(ImageSource):
    """One picture of an array (n, height, width[, 1, 3 or 4]) of numbers, as a binary PGM or PPM; samples become 8-bit
    by the rule of `pixels`."""

    array: str
    """Name of the array in the archive, such as `test_images`."""
    row: int

    def _encoded(self) -> bytes:
        try:
            return _NpzCursor(self.place, self.array, stat_file(self.place).stamp).fetch(self.row)
        except DAMAGED_NPZ as error:
            raise ImageError("damaged npz") from error


@functools.lru_cache(maxsize=_FILES_OPEN)
class _ParquetCursor:
    """A forward-moving place in one column of one file; a row behind it, or far ahead, opens the row group again.
    `stamp` distinguishes a file from its replacement."""

    def __init__(self, place: StorePath, column: str, stamp: str) -> None:
        # One column chunk at a time through a small buffer, not whole row groups in memory.
        self.file = pq.ParquetFile(open_file(place), pre_buffer=False, buffer_size=1 << 20)
        self.column = column
        self.lock = threading.Lock()
        self.kept: deque[tuple[int, pa.Array]] = deque(maxlen=_BATCHES_KEPT)
        groups = range(self.file.metadata.num_row_groups)
        self.ends = np.cumsum([self.file.metadata.row_group(group).num_rows for group in groups])
        self.next_row = self.group_end = 0
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def fetch(self, row: int) -> Any:
        """Return the row's bytes, or its list of them; None for null. Raises IndexError if the file has no such row."""
        with self.lock:
            while True:
                for start, values in self.kept:
                    if start <= row < start + len(values):
                        return values[row - start].as_py()
                if not self.next_row <= row < self.group_end:
                    group = int(np.searchsorted(self.ends, row, side="right"))
                    if group == len(self.ends):
                        raise IndexError(row)
                    self.group_end = int(self.ends[group])
                    self.next_row = self.group_end - self.file.metadata.row_group(group).num_rows
                    self.batches = self.file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self.column])
                    self.kept.clear()
                if (batch := next(self.batches, None)) is None:
                    raise IndexError(row)
                self.kept.append((self.next_row, leaf(batch, self.column)))
                self.next_row += len(batch)


def leaf(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Return the values of a column, or of a struct's field `COLUMN.FIELD`; a null struct is null."""
    if column in batch.schema.names:
        return batch.column(column)
    name, _, field = column.rpartition(".")
    return pc.struct_field(batch.column(name), [field])


@functools.lru_cache(maxsize=_FILES_OPEN)
class _NpzCursor:
    """A place in one array, deflated as a whole; a row that was passed and dropped starts over from the first."""

    def __init__(self, place: StorePath, array: str, stamp: str) -> None:
        self.archive = zipfile.ZipFile(open_file(place))
        self.array = array
        self.lock = threading.Lock()
        self.kept: OrderedDict[int, bytes] = OrderedDict()
        self._rewind()

    def _rewind(self) -> None:
        self.stream, self.shape, self.dtype = array_header(self.archive, self.array)
        shape = self.shape
        if self.dtype.kind not in "buif" or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,), (4,)):
            raise ImageError(f"array of {self.dtype} {shape} holds no pictures")
        self.row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        check_bytes(self.row_bytes)
        self.next_row = 0

    def fetch(self, row: int) -> bytes:
        """Return the row's picture. Raises EOFError if there is no such row, or the array ends before it."""
        with self.lock:
            if row >= self.shape[0]:
                raise EOFError
            if row not in self.kept and row < self.next_row:
                self._rewind()
            while row not in self.kept:
                pixels = self.stream.read(self.row_bytes)
                if len(pixels) < self.row_bytes:
                    raise EOFError
                self.kept[self.next_row] = pixels
                self.next_row += 1
                while len(self.kept) > max(_ROWS_KEPT, _BYTES_KEPT // max(1, self.row_bytes)):
                    self.kept.popitem(last=False)
            values = np.frombuffer(self.kept[row], self.dtype).reshape(self.shape[1:])
        alpha = values[..., 3] if values.shape[2:] == (4,) else None
        return ppm(picture_from(values if alpha is None else values[..., :3], alpha=alpha))


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
