"""Packs: the chunks of `shards_per_pack` consecutive shards of an array in one file, as Zarr's codec `sharding_indexed`
gives. The bodies follow one another in the order of shards and nothing lies between them, so that consecutive chunks
are one map; behind them the index has offset and length of each chunk, all ones where there is none, and a CRC32C."""

from __future__ import annotations

from collections.abc import Sequence

import google_crc32c
import numpy as np

from mmkd.base.errors import CorruptStoreError
from mmkd.store.chunk import CRC_BYTES

Index = tuple[int | None, ...]
"""Where the body of each chunk of a pack begins, in bytes; None for a chunk that is not in it."""

_ABSENT = np.uint64((1 << 64) - 1)


def index_bytes(chunks: int) -> int:
    """Return the length of the index of a pack that has room for `chunks`."""
    return 16 * chunks + CRC_BYTES


def encode_index(present: Sequence[bool], chunk_bytes: int) -> bytes:
    """Return the index of a pack whose bodies, of `chunk_bytes` each, follow one another where `present`."""
    table = np.full((len(present), 2), _ABSENT, dtype="<u8")
    there = np.flatnonzero(present)
    table[there, 0] = np.arange(len(there)) * chunk_bytes
    table[there, 1] = chunk_bytes
    body: bytes = table.tobytes()
    crc: int = google_crc32c.value(body)
    return body + crc.to_bytes(CRC_BYTES, "little")


def decode_index(data: bytes, pack_bytes: int, chunks: int, chunk_bytes: int, name: str) -> Index:
    """Read the index, the last `index_bytes(chunks)` of a pack of `pack_bytes`. Raises CorruptStoreError, which names
    `name`, if it was cut or changed, or if a chunk has another length, lies outside the pack, or overlaps another."""
    body, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
    if len(data) != index_bytes(chunks) or google_crc32c.value(body) != stored:
        raise CorruptStoreError(f"{name} is no whole pack: its index of {chunks} chunks has another CRC32C")
    table = np.frombuffer(body, dtype="<u8").reshape(chunks, 2)
    there = (table != _ABSENT).any(axis=1)
    starts, sizes = table[there].T
    room = pack_bytes - index_bytes(chunks) - chunk_bytes
    if (sizes != chunk_bytes).any() or (len(starts) and (room < 0 or (starts > np.uint64(room)).any())):
        raise CorruptStoreError(f"{name}: its index names a chunk that is not {chunk_bytes} bytes inside the pack")
    ordered = np.sort(starts)
    if (np.diff(ordered) < np.uint64(chunk_bytes)).any():
        raise CorruptStoreError(f"{name}: its index names two chunks that overlap")
    return tuple(int(start) if found else None for (start, _), found in zip(table.tolist(), there, strict=True))
