"""Many chunk files as one array, without a copy: the reason random batches are fast.

A span of addresses is reserved, then every file's body is mapped at its place in the span. As the
chunk's size is a multiple of the page, the bodies touch and the four CRC bytes after each fall
outside. Indexing the result is ordinary NumPy on memory; the kernel reads pages as they are touched.

The kernel also reads ahead, megabytes around each page on some disks. That is right when all of it fits in memory and
will be asked for sooner or later, and for rows in order; for random rows of a store larger than memory nearly all of
it is thrown away. Measured in docs/stores.md.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.store.chunk import CRC_BYTES

_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap does not name it
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_MADV_RANDOM, _MADV_WILLNEED = 1, 3
_MAP_FAILED = ctypes.c_void_p(-1).value


def can_map(chunk_bytes: int) -> bool:
    """Return True when this platform maps files at given addresses and the chunk fills whole pages."""
    return sys.platform in ("linux", "darwin") and chunk_bytes % mmap.PAGESIZE == 0


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _mmap(libc: ctypes.CDLL, address: int | None, length: int, flags: int, fd: int) -> int:
    protection = mmap.PROT_READ if fd >= 0 else 0
    mapped = libc.mmap(address, length, protection, flags, fd, 0)
    if mapped == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(mapped)


def map_chunks(
    paths: Sequence[Path | None], chunk_bytes: int, filler: Callable[[], bytes], read_around: bool = True
) -> NDArray[np.uint8]:
    """Map the bodies of chunk files side by side. Returns uint8 array (len(paths) * chunk_bytes,), read-only: writing
    to its memory is a fault, not a silent change. The mapping lives as long as the array or a view of it. Raises
    CorruptStoreError if a file has another size (touching what is not there would kill the process). Raises OSError if
    the system refuses (address space, too many maps).

    Args:
        paths: one chunk file each; None where there is none.
        chunk_bytes: size of a body; `can_map(chunk_bytes)` holds.
        filler: gives what a missing chunk reads as, `chunk_bytes` long; all missing ones share one copy,
            and it is not called when none is missing.
        read_around: let the kernel read what lies around a page that is touched; without, single pages only.
    """
    total = len(paths) * chunk_bytes
    if not total:
        return np.empty(0, dtype=np.uint8)
    libc = _libc()
    span = _mmap(libc, None, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    block = (ctypes.c_ubyte * total).from_address(span)
    weakref.finalize(block, libc.munmap, span, total)
    missing_fd = -1
    try:
        for index, path in enumerate(paths):
            if path is None:
                missing_fd = missing_fd if missing_fd >= 0 else _anonymous_file(filler())
                fd = missing_fd
            else:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe has no size, and would block
            try:
                if path is not None and (size := os.fstat(fd).st_size) != chunk_bytes + CRC_BYTES:
                    raise CorruptStoreError(
                        f"{path} has {size} bytes, expected {chunk_bytes + CRC_BYTES}; run `mmkd store verify`"
                    )
                _mmap(libc, span + index * chunk_bytes, chunk_bytes, mmap.MAP_SHARED | _MAP_FIXED, fd)
            finally:
                if path is not None:
                    os.close(fd)
    finally:
        if missing_fd >= 0:
            os.close(missing_fd)
    if not read_around:
        libc.madvise(span, total, _MADV_RANDOM)
    array: NDArray[np.uint8] = np.frombuffer(memoryview(block).toreadonly(), dtype=np.uint8)
    return array


def read_ahead(values: NDArray[Any]) -> NDArray[Any]:
    """Have the kernel fetch consecutive rows of a mapped array together, whatever it does for single pages. Returns
    `values`, to be read now. `values`: a contiguous slice of a mapped array; any other array is left alone."""
    if sys.platform in ("linux", "darwin") and values.nbytes and values.flags.c_contiguous and not values.flags.owndata:
        start = values.__array_interface__["data"][0]
        first = start - start % mmap.PAGESIZE
        # Advice only: errors for memory that is not a file map do not matter.
        _libc().madvise(first, start + values.nbytes - first, _MADV_WILLNEED)
    return values


def _anonymous_file(data: bytes) -> int:
    """Return a descriptor of a nameless file that holds `data`."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("mmkd-missing-chunk", os.MFD_CLOEXEC)
    else:
        import tempfile  # noqa: PLC0415 - only where memfd is not to be had

        fd, name = tempfile.mkstemp()
        Path(name).unlink()
    os.write(fd, data)
    return fd
