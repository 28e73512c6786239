"""One chunk file: the array's bytes, little-endian, row-major, then four bytes of CRC32C. This is what Zarr v3's codecs
[bytes, crc32c] give. It is written here by hand because the writer needs the checksum for the ledger and the file in
one atomic step; tests hold the bytes to zarr's."""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.base.places.remote import StorePath

CRC_BYTES = 4


def pad_rows(array: NDArray[Any], rows: int, fill: float) -> NDArray[Any]:
    """Extend the first axis to `rows` with `fill`: Zarr stores the last chunk at full size."""
    if len(array) == rows:
        return array
    padded = np.full((rows, *array.shape[1:]), fill, dtype=array.dtype)
    padded[: len(array)] = array
    return padded


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
        size = path.stat().st_size
        # The size first: a file that has grown to a terabyte is not read into memory to be refused.
        data = path.read_bytes() if size == expected_bytes + CRC_BYTES else b""
    except FileNotFoundError as error:
        raise CorruptStoreError(
            f"{name} is missing although the ledger vouches for it; run `mmkd store verify`"
        ) from error
    except OSError as error:
        raise CorruptStoreError(f"{name} cannot be read: {error.strerror}") from error
    if not data:
        raise CorruptStoreError(f"{name} has {size} bytes, expected {expected_bytes + CRC_BYTES}")
    body, crc = checked_body(data, expected_bytes, name)
    if crc != expected_crc:
        raise CorruptStoreError(
            f"{name} has CRC32C {crc}, the ledger vouches for {expected_crc}; run `mmkd store verify`"
        )
    return body
