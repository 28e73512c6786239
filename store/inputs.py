"""Training inputs kept beside the features: JPEGs at student size in uncompressed Arrow IPC files, memory-mapped.

    inputs/00012.arrow   columns row (int64), image_sha256 (string, of the original), jpeg (large_binary)
    inputs/00012.json    its entry, written last: size, quality, rows, images, CRC32C

They are optional, belong to no teacher, and are not in the ledger: a shard's inputs are present when their entry is. A
row whose image is not sound has no JPEG.
"""

import io
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.base.files import remove_file, write_atomically
from mmkd.base.places.remote import RemotePath, StorePath, in_parallel
from mmkd.store.hierarchy import Document, encode_sealed, list_part, read_file, read_sealed
from mmkd.store.record import Store
from mmkd.store.samples import read_part

_ATTEMPTS = 3
QUALITY = 90
"""JPEG quality; at 256 pixels about 20 kB a radiograph, and no block is seen in a random crop of 224."""

SCHEMA = pa.schema(
    [pa.field("row", pa.int64(), nullable=False), ("image_sha256", pa.string()), ("jpeg", pa.large_binary())]
)


class InputsEntry(Document):
    """Description and checksum of one shard's inputs."""

    shard: int = Field(ge=0)
    size: int = Field(gt=0)
    """Pixels of the shorter side of every image that was larger."""
    quality: int
    rows: int
    images: int
    bytes: int
    crc32c: str


def inputs_file(shard: int) -> str:
    return f"inputs/{shard:05d}.arrow"


def inputs_entry(shard: int) -> str:
    return f"inputs/{shard:05d}.json"


def write_inputs(root: StorePath, shard: int, size: int, table: pa.Table) -> InputsEntry:
    """Write one shard's inputs, then their entry. `size`: that of the entry; `table`: the columns of `SCHEMA`, one row
    for each grid row of the shard. Raises StoreError if the disk is full or read-only."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table.cast(SCHEMA).combine_chunks())
    data = sink.getbuffer()
    entry = InputsEntry(
        shard=shard,
        size=size,
        quality=QUALITY,
        rows=len(table),
        images=len(table) - table["jpeg"].null_count,
        bytes=len(data),
        crc32c=f"{google_crc32c.value(bytes(data)):08x}",
    )
    put_inputs(root, entry, data)
    return entry


def put_inputs(root: StorePath, entry: InputsEntry, data: bytes | memoryview) -> int:
    """Write a shard's file, then its entry; return the size in bytes. Raises StoreError as `write_inputs`."""
    remove_file(root / inputs_entry(entry.shard))  # it does not fit the new bytes
    write_atomically(root / inputs_file(entry.shard), data)
    write_atomically(root / inputs_entry(entry.shard), encode_sealed(entry))
    return entry.bytes


def checked_inputs(root: StorePath, entry: InputsEntry) -> bytes:
    """Return the bytes of a shard's file. Raises CorruptStoreError if it is missing, or differs from its entry."""
    name = inputs_file(entry.shard)
    data = read_file(root / name, entry.bytes)
    if len(data) != entry.bytes or f"{google_crc32c.value(data):08x}" != entry.crc32c:
        raise CorruptStoreError(f"{name}: not the bytes that its entry vouches for")
    return data


def read_inputs_ledger(root: StorePath) -> dict[int, InputsEntry]:
    """Return entries by shard, in order. Raises CorruptStoreError if one cannot be read."""
    entries = in_parallel(_read_entry, list_part(root, "inputs", "*.json"), root)
    return {entry.shard: entry for entry in entries}


def _read_entry(path: StorePath) -> InputsEntry:
    entry = read_sealed(InputsEntry, path)
    if path.name != Path(inputs_entry(entry.shard)).name:
        raise CorruptStoreError(f"{path} vouches for shard {entry.shard}, not for what it is named")
    return entry


def shards_without_inputs(store: Store, size: int) -> frozenset[int]:
    """Return shards whose inputs are still to be written: those of ordinary corpora, as a view is made of the original
    image. Raises UserError if there are inputs of another size."""
    root, there = store.root, read_inputs_ledger(store.root)
    for entry in there.values():
        if entry.size != size:
            raise UserError(
                f"{root} keeps inputs of {entry.size} pixels, not {size}; ask for {entry.size}, or delete {root}/inputs"
            )
    spans = (span for span in store.record.spans() if not span.corpus.is_linked)
    return frozenset(shard for span in spans for shard in span.shards) - there.keys()


class Inputs:
    """The inputs of a store, opened for reading. A file is mapped, or fetched, when a row of its is first needed."""

    def __init__(self, store: Store) -> None:
        self.root, self.rows_per_shard = store.root, store.record.rows_per_shard
        self.entries, self.cache = read_inputs_ledger(store.root), store.cache
        self._columns: dict[int, pa.Array] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the maps: worker processes map the files themselves."""
        return self.__dict__ | {"_columns": {}}

    @property
    def size(self) -> int | None:
        """Pixels of the shorter side; None when there are no inputs."""
        return next((entry.size for entry in self.entries.values()), None)

    def lacking(self, rows: NDArray[np.int64]) -> list[int]:
        """Return shards of these grid rows, int64 (n,) in ascending order, that have no inputs."""
        if not len(rows):
            return []
        shards = np.arange(rows[0] // self.rows_per_shard, rows[-1] // self.rows_per_shard + 1)
        first, end = (np.searchsorted(rows, edges * self.rows_per_shard) for edges in (shards, shards + 1))
        return sorted(set(shards[first < end].tolist()) - self.entries.keys())

    def jpeg(self, row: int) -> memoryview | None:
        """Return the JPEG of one row, None when its image is not sound. Raises CorruptStoreError if the file is
        damaged."""
        shard, place = divmod(row, self.rows_per_shard)
        if shard not in self._columns:
            if self.cache is not None and len(self._columns) >= self.cache.kept:
                self._columns.pop(next(iter(self._columns)))
            path = self.root / inputs_file(shard) if self.cache is None else self.fetch(shard)
            self._columns[shard] = _map_inputs(path, self.entries[shard]).column("jpeg").chunk(0)
        value = self._columns[shard][place]
        return memoryview(value.as_buffer()) if value.is_valid else None

    def fetch(self, shard: int) -> Path:
        """Return the file of the cache that holds a shard's inputs, fetched if it is not there or damaged. Raises as
        `checked_inputs`; StoreError if the cache cannot take it."""
        assert self.cache is not None
        entry = self.entries[shard]
        name = f"inputs-{shard:05d}-{entry.crc32c}"
        for _ in range(_ATTEMPTS):
            path = self.cache.fetch(name, entry.bytes, lambda: checked_inputs(self.root, entry))
            with suppress(FileNotFoundError):  # taken out by another process
                if f"{google_crc32c.value(path.read_bytes()):08x}" == entry.crc32c:
                    return path
            remove_file(path)
        raise CorruptStoreError(f"{path} was damaged {_ATTEMPTS} times; look at its disk")


def _map_inputs(path: StorePath, entry: InputsEntry) -> pa.Table:
    try:
        if not isinstance(path, RemotePath) and not path.is_file():  # mapping a pipe would block
            raise CorruptStoreError(f"{path} is missing or no file, although its entry vouches for it")
        with pa.BufferReader(path.read_bytes()) if isinstance(path, RemotePath) else pa.memory_map(str(path)) as source:
            if source.size() != entry.bytes:
                raise CorruptStoreError(f"{path} has {source.size()} bytes, its entry vouches for {entry.bytes}")
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise CorruptStoreError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not table.schema.equals(SCHEMA) or len(table) != entry.rows:
        raise CorruptStoreError(f"{path} does not hold {entry.rows} rows of {', '.join(SCHEMA.names)}")
    return table


def inputs_faults(store: Store, shards: Collection[int]) -> Iterator[tuple[str, str]]:
    """Yield unsound entries with their faults: every byte of these shards' files against entry and sample rows."""
    for path in list_part(store.root, "inputs", "*.json"):
        name = f"inputs/{path.name}"
        try:
            entry = _read_entry(path)
            if entry.shard not in shards:
                continue
            checked_inputs(store.root, entry)
            table = _map_inputs(store.root / inputs_file(entry.shard), entry)
            part, _ = read_part(store.root, entry.shard)
        except (CorruptStoreError, OSError) as error:
            yield name, str(error)
            continue
        kept = table["jpeg"].is_valid()
        if not table["row"].equals(part["row"]):
            yield name, f"{name}: its rows are not those of shard {entry.shard}"
        elif not table["image_sha256"].filter(kept).equals(part["image_sha256"].filter(kept)):
            yield name, f"{name}: its images are not those that the sample rows name"
        elif table["jpeg"].null_count != entry.rows - entry.images:
            yield name, f"{name}: holds {entry.rows - table['jpeg'].null_count} images, vouches for {entry.images}"
