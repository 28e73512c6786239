"""Chunks: the array's bytes, little-endian, row-major; a loose one ends with their CRC32C. Many files are read as one
array without a copy: a span of addresses is reserved, and every run of bodies is mapped at its place in it. As the
chunk's size is a multiple of the page, the bodies touch, and what lies behind them in a file falls outside. The
kernel's read-ahead, megabytes around each page on some disks, is wrong for random rows of a store larger than memory
(measured in docs/stores.md)."""

import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.base.places.remote import StorePath

CRC_BYTES = 4

_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap does not name it
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_MADV_RANDOM, _MADV_WILLNEED = 1, 3
_PROCESS_MADVISE = 440
"""System call, the same number on all architectures since Linux 5.10."""
_RANGES_AT_ONCE = 1024
_ADVISED = 1 << 17
"""Linux reads no more of one piece of advice than its read-ahead: 128 KiB, if nobody has changed it."""
_LOOKED_AT = 32
_MAP_FAILED = ctypes.c_void_p(-1).value


def pad_rows(array: NDArray[Any], rows: int, fill: float) -> NDArray[Any]:
    """Extend the first axis to `rows` with `fill`: Zarr stores the last chunk at full size."""
    if len(array) == rows:
        return array
    return np.pad(array, [(0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)], constant_values=fill)


def encode_chunk(array: NDArray[Any]) -> tuple[bytes, str]:
    """Return the file's bytes and its CRC32C as eight hex digits."""
    body = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    crc = google_crc32c.value(body)
    return body + crc.to_bytes(CRC_BYTES, "little"), f"{crc:08x}"


def checked_body(data: bytes, expected_bytes: int, name: str) -> tuple[bytes, str]:
    """Strip and check the CRC of a chunk file; return its body and the CRC in hex. Raises CorruptStoreError if the size
    or the checksum is wrong; the message names `name`."""
    if len(data) != expected_bytes + CRC_BYTES:
        raise CorruptStoreError(f"{name} has {len(data)} bytes, expected {expected_bytes + CRC_BYTES}")
    body, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
    crc = google_crc32c.value(body)
    if crc != stored:
        raise CorruptStoreError(f"{name} has CRC32C {crc:08x}, but {stored:08x} was written with it")
    return body, f"{crc:08x}"


def read_body(root: StorePath, name: str, expected_bytes: int, expected_crc: str) -> bytes:
    """Read the body of chunk file `name` if it agrees with its ledger entry. Raises CorruptStoreError if it is missing,
    unreadable, of another size, or with another checksum."""
    path = root / name
    try:
        # The size first: a file that has grown to a terabyte is not read into memory to be refused.
        if (size := path.stat().st_size) != expected_bytes + CRC_BYTES:
            raise CorruptStoreError(f"{name} has {size} bytes, expected {expected_bytes + CRC_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptStoreError(
            f"{name} is missing although the ledger vouches for it; run `mmkd store verify`"
        ) from error
    except OSError as error:
        raise CorruptStoreError(f"{name} cannot be read: {error.strerror}") from error
    body, crc = checked_body(data, expected_bytes, name)
    if crc != expected_crc:
        raise CorruptStoreError(
            f"{name} has CRC32C {crc}, the ledger vouches for {expected_crc}; run `mmkd store verify`"
        )
    return body


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


def _mmap(libc: ctypes.CDLL, address: int | None, length: int, flags: int, fd: int, offset: int = 0) -> int:
    mapped = libc.mmap(address, length, mmap.PROT_READ if fd >= 0 else 0, flags, fd, offset)
    if mapped == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(mapped)


class UnalignedError(Exception):
    """A body does not begin at a page, so that it cannot be mapped."""


@dataclass(frozen=True)
class Run:
    """Bodies of `chunks` consecutive shards that follow one another in a file from byte `start` on. file: an open
    descriptor, or a path; None for chunks that are in no file. size: bytes that the file must have, where known."""

    file: int | Path | None
    start: int
    chunks: int
    size: int | None = None


def map_runs(
    runs: Iterable[Run], chunks: int, chunk_bytes: int, filler: Callable[[], bytes], read_around: bool = True
) -> NDArray[np.uint8]:
    """Map runs of `chunks` bodies, of `chunk_bytes` each, side by side: uint8 (chunks * chunk_bytes,), read-only.
    `filler` gives the bytes that all missing chunks share; `read_around`: let the kernel read around a page that is
    touched. Raises CorruptStoreError if a file has another size (touching what is not there would kill the process);
    OSError if the system refuses. `can_map(chunk_bytes)` must hold."""
    total = chunks * chunk_bytes
    if not total:
        return np.empty(0, dtype=np.uint8)
    libc = _libc()
    span = _mmap(libc, None, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    block = (ctypes.c_ubyte * total).from_address(span)
    weakref.finalize(block, libc.munmap, span, total)
    missing: int | None = None
    place = span
    try:
        for run in runs:
            if run.file is None and missing is None:
                missing = _anonymous_file(filler())
            # A pipe has no size, and opening it would block.
            opened = (
                os.open(run.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if isinstance(run.file, Path) else None
            )
            fd = opened if opened is not None else missing if run.file is None else run.file
            assert isinstance(fd, int)
            try:
                if run.size is not None and (size := os.fstat(fd).st_size) != run.size:
                    raise CorruptStoreError(
                        f"{run.file} has {size} bytes, expected {run.size}; run `mmkd store verify`"
                    )
                if run.start % mmap.PAGESIZE:
                    raise UnalignedError
                length = run.chunks * chunk_bytes
                _mmap(libc, place, length, mmap.MAP_SHARED | _MAP_FIXED, fd, run.start)
                place += length
            finally:
                if opened is not None:
                    os.close(opened)
    finally:
        if missing is not None:
            os.close(missing)
    assert place == span + total
    if not read_around:
        libc.madvise(span, total, _MADV_RANDOM)
    return np.frombuffer(memoryview(block).toreadonly(), dtype=np.uint8)


def read_ahead(values: NDArray[Any]) -> NDArray[Any]:
    """Return `values` after telling the kernel to fetch the pages of a contiguous slice of a mapped array together."""
    if sys.platform in ("linux", "darwin") and values.nbytes and values.flags.c_contiguous and not values.flags.owndata:
        start = values.__array_interface__["data"][0]
        first = start - start % mmap.PAGESIZE
        # Advice only: errors for memory that is not a file map do not matter.
        libc, end = _libc(), start + values.nbytes
        for part in range(first, end, _ADVISED):
            libc.madvise(part, min(_ADVISED, end - part), _MADV_WILLNEED)
    return values


def ask_for_rows(address: int, row_bytes: int, rows: NDArray[np.int64], look: bool = True) -> int:
    """Have the kernel read the pages of some rows of a mapped array, all at a time: page faults come one by one, and
    leave a disk idle. Nothing is asked for when the first rows are in memory; without `look` they are asked for anyway:
    Linux says of files that the user may not write that all of it is there. Returns how many rows were asked for; it is
    advice, so that a system which does not take it changes nothing."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open") or not len(rows):
        return 0
    libc, first = _libc(), (address + rows * row_bytes).astype(np.uint64)
    start = first & ~np.uint64(mmap.PAGESIZE - 1)
    ranges = np.stack([start, first + np.uint64(row_bytes) - start], axis=1)
    if look and all(_is_resident(libc, *one) for one in ranges[:_LOOKED_AT].tolist()):
        return 0
    low, high = ranges[:, 0].min(), ranges.sum(axis=1).max()
    if len(rows) * mmap.PAGESIZE >= int(high - low) // 2:  # most pages are wanted: the disk reads them in order
        starts = np.arange(low, high, _ADVISED, dtype=np.uint64)
        ranges = np.stack([starts, np.minimum(high - starts, np.uint64(_ADVISED))], axis=1)
    try:
        process = os.pidfd_open(os.getpid())
    except OSError:  # containers may refuse it
        return 0
    try:
        for part in range(0, len(ranges), _RANGES_AT_ONCE):
            some = np.ascontiguousarray(ranges[part : part + _RANGES_AT_ONCE])
            places = ctypes.c_void_p(some.ctypes.data)
            libc.syscall(_PROCESS_MADVISE, process, places, ctypes.c_size_t(len(some)), _MADV_WILLNEED, 0)
    finally:
        os.close(process)
    return len(rows)


def _is_resident(libc: ctypes.CDLL, start: int, length: int) -> bool:
    states = (ctypes.c_ubyte * (-(-length // mmap.PAGESIZE)))()
    failed = libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), states)
    return failed == 0 and all(state & 1 for state in states)


def _anonymous_file(data: bytes) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("mmkd-missing-chunk", os.MFD_CLOEXEC)
    else:
        fd, name = tempfile.mkstemp()
        Path(name).unlink()
    os.write(fd, data)
    return fd
