"""One array of a store: mapped, copied into memory, or fetched on access, with the same values."""

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.base.files import remove_file
from mmkd.base.places.remote import in_parallel
from mmkd.store.cache import Cache
from mmkd.store.chunk import UnalignedError, can_map, map_runs, read_ahead
from mmkd.store.encoding import decode_rows
from mmkd.store.stored_array import StoredArray

_ATTEMPTS = 3
CACHE_BYTES = 64 << 20
"""Chunks of one remote array that are kept, so that reading rows in order fetches each chunk once."""


class LazyRows(ABC):
    """Rows computed on access. Read-only, and safe to use from several threads."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def _gather(self, rows: Any) -> NDArray[Any]: ...

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Return rows along the first axis. Raises IndexError if there is no such row, or for an index of more axes."""
        if isinstance(rows, tuple):
            raise IndexError(f"{self!r} takes rows only; index what it gives: features[rows][..., columns]")
        return self._gather(rows)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape} {self.dtype}; index it with rows>"


FeatureArray: TypeAlias = NDArray[Any] | LazyRows
"""Features of one tower: (N, D) values, NaN where missing. A mapped `numpy.ndarray`, or, for int8 (decoded to float32)
and behind a URL, a `LazyRows`: an index along the first axis, or `numpy.asarray`, gives a `numpy.ndarray`."""


@dataclass(frozen=True)
class ChunkedArray:
    """An array of a teacher with what the ledger says of its chunks."""

    stored: StoredArray
    rows: int
    checksums: tuple[str, ...]
    """CRC32C of each shard's chunk; empty where the ledger vouches for none."""
    read_around: bool = True
    """As `mmkd.store.chunk.map_runs` takes it."""
    cache: Cache | None = None

    def body(self, shard: int) -> NDArray[Any]:
        """Return one chunk, (R, D) or (R,): checked against the ledger, or the fill value where there is none. Raises
        CorruptStoreError as `StoredArray.read`; StoreError if the cache cannot take it."""
        crc, stored = self.checksums[shard], self.stored
        if not crc:
            return stored.fill()
        for _ in range(_ATTEMPTS if self.cache is not None else 0):
            path = self.fetch(shard)
            with suppress(FileNotFoundError, ValueError):  # taken out by another process, or cut short
                if f"{google_crc32c.value(path.read_bytes()):08x}" == crc:
                    shape = stored.spec.shape(stored.per_shard)
                    return np.asarray(np.memmap(path, stored.spec.stored, "r", shape=shape))
            remove_file(path)
        return stored.read(shard, crc)

    def fetch(self, shard: int) -> Path:
        """Return the file of the cache that holds the body of a chunk, fetched if it is not there. Raises as `body`."""
        assert self.cache is not None
        crc, stored = self.checksums[shard], self.stored
        name = f"{stored.slug}-{stored.spec.name}-{shard:05d}-{crc}"
        return self.cache.fetch(name, stored.chunk_bytes, lambda: stored.read(shard, crc).tobytes())

    def load(self) -> NDArray[Any]:
        """Return the whole array in memory, read-only. Raises CorruptStoreError as `StoredArray.read`."""
        shards, per_shard, spec = len(self.checksums), self.stored.per_shard, self.stored.spec
        array = np.empty(spec.shape(shards * per_shard), dtype=spec.stored)
        for shard, body in enumerate(in_parallel(self.body, range(shards), self.stored.root)):
            array[shard * per_shard : (shard + 1) * per_shard] = body
        array.flags.writeable = False
        return array[: self.rows]

    def map(self) -> NDArray[Any]:
        """Return the whole array over the files' pages, read-only. Raises CorruptStoreError if a chunk is missing or
        has another size; UserError if the system allows a process fewer maps than there are runs of chunks."""
        try:
            try:
                return self._mapped()
            except FileNotFoundError:  # packed since it was looked up, or gone
                self.stored.forget()
                return self._mapped()
        except FileNotFoundError as error:
            step = f"run `mmkd store verify {self.stored.root}`"
            raise CorruptStoreError(
                f"{error.filename} is missing although the ledger vouches for it; {step}"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            limit, root = Path("/proc/sys/vm/max_map_count"), self.stored.root
            allowed = f" (vm.max_map_count is {limit.read_text().strip()})" if limit.is_file() else ""
            raise UserError(
                f"{root}: the system does not let this process map {len(self.checksums):,} more chunks{allowed}; "
                f"pack them with `mmkd store fold {root}`, which needs a map per pack, or allow more with "
                "`sysctl -w vm.max_map_count=1000000`"
            ) from error

    def _mapped(self) -> NDArray[Any]:
        stored, chunks = self.stored, len(self.checksums)
        runs = stored.runs([bool(checksum) for checksum in self.checksums])
        flat = map_runs(runs, chunks, stored.chunk_bytes, lambda: stored.fill().tobytes(), self.read_around)
        return flat.view(stored.spec.stored).reshape(stored.spec.shape(chunks * stored.per_shard))[: self.rows]

    def open(self) -> NDArray[Any] | LazyRows:
        """Return the array: mapped where files can be, fetched by chunks behind a URL, else in memory."""
        if not isinstance(self.stored.root, Path):
            return RemoteRows(self)
        if not can_map(self.stored.chunk_bytes):
            return self.load()
        try:
            return self.map()
        except UnalignedError:  # a pack of another writer
            return self.load()


class RemoteRows(LazyRows):
    """Rows behind a URL, fetched by whole chunks, of which the last are kept: for single rows and sequential reads."""

    def __init__(self, array: ChunkedArray) -> None:
        self._array, self._stored = array, array.stored
        self.shape = array.stored.spec.shape(array.rows)
        self.dtype = np.dtype(array.stored.spec.dtype)
        self._in_parallel = array.cache is None  # else what is needed is on disk

    @cached_property
    def _cached(self) -> int:
        cache = self._array.cache
        return cache.kept if cache else max(1, CACHE_BYTES // max(1, self._stored.chunk_bytes))

    @cached_property
    def _chunk(self) -> Callable[[int], NDArray[Any]]:
        return lru_cache(maxsize=self._cached)(self._array.body)

    def _gather(self, rows: Any) -> NDArray[Any]:
        picked = rows if _are_rows(rows, len(self)) else np.arange(len(self))[rows]
        flat = picked.reshape(-1)
        shards = flat // self._stored.per_shard
        out = np.empty((len(flat), *self.shape[1:]), dtype=self.dtype)
        wanted = np.unique(shards).tolist()
        for start in range(0, len(wanted), self._cached):
            some = wanted[start : start + self._cached]
            bodies = in_parallel(self._chunk, some, self._stored.root if self._in_parallel else Path())
            for shard, body in zip(some, bodies, strict=True):
                here = shards == shard
                out[here] = body[flat[here] - shard * self._stored.per_shard]
        return out.reshape(*picked.shape, *self.shape[1:])


def _are_rows(rows: Any, count: int) -> bool:
    """Return True for an array of row numbers, none of them from the end: numbering all rows again would cost more."""
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iu" or not rows.size:
        return False
    return bool(rows.min() >= 0 and rows.max() < count)


def consecutive(features: FeatureArray, rows: slice) -> NDArray[Any]:
    """Return rows in order, read together: for what goes through a whole array."""
    values: NDArray[Any] = features[rows]
    return read_ahead(values) if isinstance(features, np.ndarray) else values


class DecodedRows(LazyRows):
    """int8 codes (N, D) and their scales (N,), NaN where missing, as float32 values that are decoded on access."""

    def __init__(self, codes: FeatureArray, scales: FeatureArray) -> None:
        self.codes = codes
        self.scales = scales
        self.shape = codes.shape
        self.dtype = np.dtype(np.float32)

    def _gather(self, rows: Any) -> NDArray[Any]:
        return decode_rows([np.asarray(self.codes[rows]), np.asarray(self.scales[rows])])
