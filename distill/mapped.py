"""Arrays in a folder, written part by part and mapped when they are read: `NAME.bin`, little-endian and row-major, and
`arrays.json`, written last, with type, shape and CRC32C of each. Without it, or when it says otherwise, the folder
holds nothing, and whoever needs it writes it again."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import MmkdError
from mmkd.base.files import disk_errors, write_atomically
from mmkd.store.hierarchy import Document, encode_sealed, read_sealed

_FILE = "arrays.json"
_CHECKED_TOGETHER = 1 << 22


class ArrayFile(Document):
    """One array's file."""

    dtype: str
    shape: tuple[int, ...]
    crc32c: str


class ArrayList(Document):
    """All arrays of a folder, and what their writer noted."""

    arrays: dict[str, ArrayFile]
    notes: dict[str, Any]


class ArrayWriter:
    """Writes the arrays of a folder that does not exist yet; a context. Raises StoreError if the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._stack = folder, ExitStack()
        self._open: dict[str, Any] = {}
        self._known: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
        with disk_errors(folder):
            folder.mkdir(parents=True)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with disk_errors(self.folder):
            self._stack.close()

    def append(self, parts: Mapping[str, NDArray[Any]]) -> None:
        """Add rows to arrays, which begin when they are first named."""
        for name, part in parts.items():
            with disk_errors(self.folder / f"{name}.bin"):
                if name not in self._open:
                    self._open[name] = self._stack.enter_context((self.folder / f"{name}.bin").open("wb"))
                    self._known[name] = part.dtype.newbyteorder("<"), (0, *part.shape[1:]), 0
                dtype, (rows, *row), crc = self._known[name]
                data = np.ascontiguousarray(part, dtype=dtype).tobytes()
                self._open[name].write(data)
                self._known[name] = dtype, (rows + len(part), *row), google_crc32c.extend(crc, data)

    def finish(self, notes: dict[str, Any]) -> None:
        """Flush everything to disk, then write the list."""
        for name, file in self._open.items():
            with disk_errors(self.folder / f"{name}.bin"):
                file.flush()
                os.fsync(file.fileno())
        arrays = {
            name: ArrayFile(dtype=dtype.str, shape=shape, crc32c=f"{crc:08x}")
            for name, (dtype, shape, crc) in self._known.items()
        }
        write_atomically(self.folder / _FILE, encode_sealed(ArrayList(arrays=arrays, notes=notes)))


def map_arrays(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays by name, over the files' pages and read-only, and the notes. Raises CorruptStoreError if the
    list is missing or damaged; OSError, ValueError if a file is missing or shorter."""
    listed = read_sealed(ArrayList, folder / _FILE)

    def map_one(name: str, file: ArrayFile) -> NDArray[Any]:
        if 0 in file.shape:
            return np.empty(file.shape, dtype=file.dtype)
        return np.asarray(np.memmap(folder / f"{name}.bin", file.dtype, mode="r", shape=file.shape))

    return {name: map_one(name, file) for name, file in listed.arrays.items()}, listed.notes


def is_intact(folder: Path) -> bool:
    """Read every byte; return True if they are what was written."""
    try:
        for name, file in read_sealed(ArrayList, folder / _FILE).arrays.items():
            crc = 0
            with (folder / f"{name}.bin").open("rb") as stored:
                while data := stored.read(_CHECKED_TOGETHER):
                    crc = google_crc32c.extend(crc, data)
            if f"{crc:08x}" != file.crc32c:
                return False
        map_arrays(folder)
    except (MmkdError, OSError, ValueError):
        return False
    return True
