"""Images in Parquet cells, read forward, in a shard's order, a few rows at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmkd.base.errors import UnreachableError
from mmkd.base.images.source import MAX_BYTES, ImageError, unreadable
from mmkd.base.places.reading import open_file, stat_file
from mmkd.base.places.remote import StorePath

# Parquet has no way to one cell but through its row group. Rows are asked for nearly in order (decode threads run a
# little apart), so a cursor that keeps the last rows answers all of them, and memory is a few batches.
_BATCH_ROWS = 16
_BATCHES_KEPT = 12
_FILES_OPEN = 4


@dataclass(frozen=True)
class ParquetImage:
    """One cell with encoded bytes."""

    place: StorePath
    column: str
    """Dotted path of the column, such as `image.bytes`."""
    row: int
    """Row number in the file."""
    item: int | None = None
    """Index within a list cell."""

    @property
    def path(self) -> str:
        """The file."""
        return str(self.place)

    def read(self) -> bytes:
        """Return the cell's bytes. Raises ImageError if it is missing, null, damaged, or too large."""
        try:
            data = _cursor(self.place, self.column, stat_file(self.place).stamp).fetch(self.row)
            if self.item is not None and data is not None:
                data = data[self.item]
                data = data.get("bytes") if isinstance(data, dict) else data
        except UnreachableError as error:
            raise unreadable(error) from error
        except (OSError, KeyError, IndexError, pa.ArrowException) as error:
            if isinstance(error, OSError):
                # Arrow reports damaged pages as OSError too, without an errno.
                raise (unreadable(error) if error.strerror else ImageError("damaged Parquet")) from error
            raise ImageError("damaged Parquet") from error
        if data is None:
            raise ImageError("null in Parquet")
        if not data:
            raise ImageError("empty file")
        if len(data) > MAX_BYTES:
            raise ImageError(f"larger than {MAX_BYTES >> 20} MB")
        encoded: bytes = data
        return encoded


class _Cursor:
    """A forward-moving place in one column of one file; a row behind it, or far ahead, opens the row group again."""

    def __init__(self, file: IO[bytes], column: str) -> None:
        # One column chunk at a time through a small buffer, not whole row groups in memory.
        self.file = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        self.column = column
        self.lock = threading.Lock()
        self.kept: deque[tuple[int, pa.Array]] = deque(maxlen=_BATCHES_KEPT)
        self.next_row = 0
        self.group_end = 0
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def fetch(self, row: int) -> Any:
        """Return the row's bytes, or its list of them; None for null. Raises IndexError if the file has no such row."""
        with self.lock:
            while True:
                for start, values in self.kept:
                    if start <= row < start + len(values):
                        return values[row - start].as_py()
                if not self.next_row <= row < self.group_end:
                    self._open_group(row)
                self._advance()

    def _open_group(self, row: int) -> None:
        metadata = self.file.metadata
        start = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if start <= row < start + rows:
                self.batches = self.file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self.column])
                self.next_row, self.group_end = start, start + rows
                self.kept.clear()
                return
            start += rows
        raise IndexError(row)

    def _advance(self) -> None:
        batch = next(self.batches, None)
        if batch is None:
            raise IndexError(self.next_row)
        values = leaf(batch, self.column)
        self.kept.append((self.next_row, values))
        self.next_row += len(values)


_cursors: OrderedDict[tuple[Any, ...], _Cursor] = OrderedDict()
_cursors_lock = threading.Lock()


def _cursor(place: StorePath, column: str, stamp: str) -> _Cursor:
    key = (place, column, stamp)
    with _cursors_lock:
        if key not in _cursors:
            _cursors[key] = _Cursor(open_file(place), column)
            while len(_cursors) > _FILES_OPEN:
                _cursors.popitem(last=False)
        _cursors.move_to_end(key)
        return _cursors[key]


def leaf(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Return the values of a column, or of a struct's field `COLUMN.FIELD`; a null struct is null."""
    if column in batch.schema.names:
        return batch.column(column)
    name, _, field = column.rpartition(".")
    return pc.struct_field(batch.column(name), [field])
