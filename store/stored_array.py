"""The files of one array of a teacher: packs, and loose chunks beside them until they are packed. A loose chunk goes
before the pack's. Both are looked up when they are read, because a writer may pack loose chunks meanwhile. A pack has
the chunks of `shards_per_pack` consecutive shards, as Zarr's codec `sharding_indexed` gives. The bodies follow one
another in the order of shards and nothing lies between them, so that consecutive chunks are one map; behind them the
index has offset and length of each chunk, all ones where there is none, and a CRC32C."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import list_folder
from mmkd.base.places.remote import StorePath
from mmkd.store.chunk import CRC_BYTES, Run, read_body
from mmkd.store.encoding import ArraySpec
from mmkd.store.hierarchy import read_range
from mmkd.store.record import Store

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


class StoredArray:
    """Chunks of one array by shard, wherever they lie."""

    def __init__(self, store: Store, slug: str, spec: ArraySpec) -> None:
        self.root, self.slug, self.spec = store.root, slug, spec
        self.per_shard, self.per_pack = store.record.rows_per_shard, store.record.shards_per_pack
        self.chunk_bytes = spec.chunk_bytes(self.per_shard)
        self._listed: tuple[frozenset[int], frozenset[int]] | None = None
        self._indexes: dict[int, Index] = {}

    @property
    def loose(self) -> frozenset[int]:
        """Shards with a loose chunk, as they were when this was first asked."""
        return self._files[0]

    @property
    def _files(self) -> tuple[frozenset[int], frozenset[int]]:
        """Shards with a loose chunk, and numbers of packs."""
        listed = self._listed  # other threads may forget it at any moment
        if listed is None:
            # Loose ones first: what is packed in between is then in both lists.
            loose = _numbers((self.root / self.spec.loose(self.slug, 0)).parent)
            pack = self.root / self.spec.pack(self.slug, 0)
            self._listed = listed = loose, _numbers(pack.parent if self.spec.width is None else pack.parent.parent)
        return listed

    def has_file(self, shard: int) -> bool:
        """Return True if there is a file that may hold a chunk."""
        loose, packs = self._files
        return shard in loose or shard // self.per_pack in packs

    def fill(self) -> NDArray[Any]:
        """Return a chunk of which nothing is stored, (R, D) or (R,)."""
        return np.full(self.spec.shape(self.per_shard), self.spec.fill, dtype=self.spec.stored)

    def forget(self) -> None:
        """Look the files up again."""
        self._listed, self._indexes = None, {}

    def read(self, shard: int, crc32c: str) -> NDArray[Any]:
        """Return one chunk, (R, D) or (R,). Raises CorruptStoreError if it is missing, cannot be read, or has another
        size or checksum than its ledger entry."""
        try:
            body = self._body(shard, crc32c)
        except CorruptStoreError:  # perhaps of files that were packed since they were looked up
            self.forget()
            body = self._body(shard, crc32c)
        return np.frombuffer(body, dtype=self.spec.stored).reshape(self.spec.shape(self.per_shard))

    def file(self, shard: int) -> str:
        """Return the name of the file that holds a chunk."""
        number = shard // self.per_pack
        loose, packs = self._files
        is_packed = shard not in loose and number in packs
        return self.spec.pack(self.slug, number) if is_packed else self.spec.loose(self.slug, shard)

    def _body(self, shard: int, crc32c: str) -> bytes:
        name = self.file(shard)
        number, place = divmod(shard, self.per_pack)
        if name == self.spec.loose(self.slug, shard):
            return read_body(self.root, name, self.chunk_bytes, crc32c)
        try:
            if (index := self._indexes.get(number)) is None:
                self._indexes[number] = index = self._read_index(name)
            if (start := index[place]) is None:
                raise CorruptStoreError(f"{name} has no chunk of shard {shard} although the ledger vouches for it")
            data = read_range(self.root / name, start, self.chunk_bytes)
        except OSError as error:
            raise CorruptStoreError(_unreadable(name, shard, error)) from error
        if (found := f"{google_crc32c.value(data):08x}") != crc32c:
            raise CorruptStoreError(
                f"{name}: the chunk of shard {shard} has CRC32C {found}, the ledger vouches for {crc32c}; "
                "run `mmkd store verify`"
            )
        return data

    def _read_index(self, name: str) -> Index:
        size, length = (self.root / name).stat().st_size, index_bytes(self.per_pack)
        # What is shorter is not opened: a pipe would block.
        data = read_range(self.root / name, size - length, length) if size >= length else b""
        return decode_index(data, size, self.per_pack, self.chunk_bytes, name)

    def runs(self, wanted: Sequence[bool]) -> Iterator[Run]:
        """Yield the files' parts that hold the chunks, on disk, in order of shards; those that are not `wanted`, one
        for each shard, are runs without a file. Raises CorruptStoreError as `read`; FileNotFoundError if a file was
        packed or taken away meanwhile."""
        for first in range(0, len(wanted), self.per_pack):
            yield from self._runs_of_pack(first // self.per_pack, wanted[first : first + self.per_pack])

    def _runs_of_pack(self, number: int, wanted: Sequence[bool]) -> Iterator[Run]:
        first, name, root = number * self.per_pack, self.spec.pack(self.slug, number), Path(str(self.root))
        packed = [place for place, want in enumerate(wanted) if want and first + place not in self.loose]
        index: Index | None = None
        with ExitStack() as stack:
            if packed and number in self._files[1]:
                # Index and bodies through one descriptor: the pack may be replaced by one with other places.
                fd = os.open(root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                stack.callback(os.close, fd)
                size, length = os.fstat(fd).st_size, index_bytes(self.per_pack)
                end = os.pread(fd, length, max(size - length, 0))
                index = decode_index(end, size, self.per_pack, self.chunk_bytes, name)
                if (lost := next((place for place in packed if index[place] is None), None)) is not None:
                    raise FileNotFoundError(2, "no chunk", f"{name}, shard {first + lost}")
            # Chunks whose bodies follow one another have one distance from their place.
            starts = {place: index[place] or 0 for place in packed} if index is not None else {}
            key = {place: start - place * self.chunk_bytes for place, start in starts.items()}
            for _, run in groupby(range(len(wanted)), lambda place: key.get(place, f"{place}")):
                place, *more = run
                if place in starts:
                    yield Run(fd, starts[place], 1 + len(more))
                elif wanted[place]:
                    loose = root / self.spec.loose(self.slug, first + place)
                    yield Run(loose, 0, 1, self.chunk_bytes + CRC_BYTES)
                else:
                    yield Run(None, 0, 1)


def _numbers(folder: StorePath) -> frozenset[int]:
    return frozenset(int(path.name) for path in list_folder(folder) if path.name.isdecimal())


def _unreadable(name: str, shard: int, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing although the ledger vouches for shard {shard}; run `mmkd store verify`"
    return f"{name} cannot be read: {error.strerror or error}"
