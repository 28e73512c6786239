"""The files of one array of a teacher: packs, and loose chunks beside them until they are packed. A loose chunk goes
before the pack's. Both are looked up when they are read, because a writer may pack loose chunks meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import list_folder
from mmkd.base.places.remote import RemotePath, StorePath
from mmkd.store.chunk import CRC_BYTES, Run, read_body
from mmkd.store.encoding import ArraySpec
from mmkd.store.pack import Index, decode_index, index_bytes
from mmkd.store.record import Store


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
            data = self._range(name, start, self.chunk_bytes)
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
        data = self._range(name, size - length, length) if size >= length else b""
        return decode_index(data, size, self.per_pack, self.chunk_bytes, name)

    def _range(self, name: str, start: int, length: int) -> bytes:
        path = self.root / name
        if isinstance(path, RemotePath):
            return path.read_range(start, length)
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def runs(self, wanted: Sequence[bool]) -> Iterator[Run]:
        """Yield the files' parts that hold the chunks, on disk, in order of shards; those that are not `wanted`, one
        for each shard, are runs without a file. Raises CorruptStoreError as `read`; FileNotFoundError if a file was
        packed or taken away meanwhile."""
        for first in range(0, len(wanted), self.per_pack):
            yield from self._runs_of_pack(first // self.per_pack, wanted[first : first + self.per_pack])

    def _runs_of_pack(self, number: int, wanted: Sequence[bool]) -> Iterator[Run]:
        first, name = number * self.per_pack, self.spec.pack(self.slug, number)
        if number not in self._files[1] or self.loose.issuperset(first + p for p, want in enumerate(wanted) if want):
            for place, want in enumerate(wanted):
                yield from [self._loose_run(first + place)] if want else [Run(None, 0, 1)]
            return
        # Index and bodies through one descriptor: the pack may be replaced by one with other places.
        fd = os.open(Path(str(self.root)) / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size, length = os.fstat(fd).st_size, index_bytes(self.per_pack)
            index = decode_index(
                os.pread(fd, length, max(size - length, 0)), size, self.per_pack, self.chunk_bytes, name
            )
            place = 0
            while place < len(wanted):
                if not wanted[place]:
                    yield Run(None, 0, 1)
                elif first + place in self.loose:
                    yield self._loose_run(first + place)
                elif (start := index[place]) is None:
                    raise FileNotFoundError(2, "no chunk", f"{name}, shard {first + place}")
                else:
                    count = 1
                    while (
                        place + count < len(wanted)
                        and wanted[place + count]
                        and first + place + count not in self.loose
                        and index[place + count] == start + count * self.chunk_bytes
                    ):
                        count += 1
                    yield Run(fd, start, count)
                    place += count - 1
                place += 1
        finally:
            os.close(fd)

    def _loose_run(self, shard: int) -> Run:
        return Run(Path(str(self.root)) / self.spec.loose(self.slug, shard), 0, 1, self.chunk_bytes + CRC_BYTES)


def _numbers(folder: StorePath) -> frozenset[int]:
    return frozenset(int(path.name) for path in list_folder(folder) if path.name.isdecimal())


def _unreadable(name: str, shard: int, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing although the ledger vouches for shard {shard}; run `mmkd store verify`"
    return f"{name} cannot be read: {error.strerror or error}"
