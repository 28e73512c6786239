"""Training from a store behind a URL: the shards of a window are fetched into a bounded folder of this machine, those
of the next window while the steps of this one run."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import ConfigError, MmkdError
from mmkd.base.places.remote import REQUESTS, RemotePath
from mmkd.distill.config import RunConfig
from mmkd.distill.order import Windows
from mmkd.store import FeatureStore
from mmkd.store.array import ChunkedArray
from mmkd.store.cache import Cache
from mmkd.store.inputs import Inputs
from mmkd.store.layout import TOWERS, Tower


def open_store(config: RunConfig, scratch: Path | None = None) -> FeatureStore:
    """Open the store of a run; one behind a URL gets a cache: `data.cache`, or in `scratch` where that is given, or
    `out`. Raises ConfigError if its order reads random rows, or its features are to be resident; otherwise as
    `FeatureStore.open`."""
    store = FeatureStore.open(config.store)
    if isinstance(store.root, RemotePath):
        if config.data.order != "windows":
            raise ConfigError(
                f"store: {store.root} is behind a URL and data.order {config.data.order} reads random rows; set "
                f"data.order to windows, or copy it with `mmkd store pull {store.root} FOLDER`"
            )
        if config.data.features == "resident":
            raise ConfigError(
                f"data.features: resident reads all of {store.root}, which is behind a URL; leave it out, or copy the "
                f"store with `mmkd store pull {store.root} FOLDER`"
            )
        name = hashlib.sha256(f"{store.root} {store.record.created}".encode()).hexdigest()[:12]
        folder = config.data.cache or (scratch or config.out) / "cache"
        store.cache = Cache(folder, int(config.data.cache_gb * 1e9), name)
    return store


class FetchAhead:
    """Fetches the windows that steps come to. slugs: teachers whose features are needed. inputs: the store's images,
    None when they are read from the corpus. beside: of a tower, grid rows and those whose features may stand for
    theirs, int64 (k,) each. rows_ahead: rows that are asked for before those of the step in hand."""

    def __init__(
        self,
        store: FeatureStore,
        windows: Windows,
        slugs: Iterable[str],
        inputs: Inputs | None,
        beside: Mapping[Tower, tuple[NDArray[np.int64], NDArray[np.int64]]],
        *,
        rows_ahead: int,
        epochs: int,
    ) -> None:
        """Raises ConfigError if the windows that are in use at a time do not fit into the cache."""
        assert store.cache is not None
        self.windows, self.inputs, self.epochs = windows, inputs, epochs
        cards = [store.card(slug) for slug in slugs]
        self._arrays: dict[Tower, list[ChunkedArray]] = {
            tower: [
                store.array(card.slug, spec)
                for card in cards
                if tower in card.towers
                for spec in card.tower_arrays(tower)
            ]
            for tower in TOWERS
        }
        self._beside: dict[Tower, dict[int, list[int]]] = {tower: {} for tower in TOWERS}
        for tower, rows in beside.items():
            owns, others = (part // store.record.rows_per_shard for part in rows)
            for pair in np.unique(owns * store.shards + others).tolist():
                own, other = divmod(pair, store.shards)
                self._beside[tower].setdefault(own, []).append(other)
        self._begun: dict[tuple[int, int], list[Future[Path]]] = {}
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="mmkd-fetch")
        images = max((entry.bytes for entry in inputs.entries.values()), default=0) if inputs is not None else 0
        sizes = {tower: sum(array.stored.chunk_bytes for array in arrays) for tower, arrays in self._arrays.items()}

        def size(shards: list[int]) -> int:
            return images * len(shards) + sum(len(self._needed(tower, shards)) * sizes[tower] for tower in TOWERS)

        every, together = windows.shards.tolist(), min(windows.together, len(windows.shards))
        store.cache.kept = 2 * together * max(len(self._needed(tower, [shard])) for tower in TOWERS for shard in every)
        # That of the step in hand, those that are asked for, the last one of an epoch, which is short, and the next.
        count = 3 + -(-rows_ahead // int(np.sort(windows.sizes)[:together].sum()))
        needed = min(count * together * max(size([shard]) for shard in every), size(every))
        if needed > store.cache.room:
            more = " with their views and further captions" if beside else ""
            raise ConfigError(
                f"data.cache_gb {store.cache.limit / 1e9:g} is too little: up to {count} windows of {together} shards "
                f"are in use at a time{more}, {needed / 1e9:.3g} GB; raise it, or lower data.window"
            )

    def __call__(self, epoch: int, positions: range) -> None:
        """Begin the windows of these positions and the one behind them; wait for the images of the former, which worker
        processes read. Raises UnreachableError, CorruptStoreError if they cannot be fetched; StoreError if the disk is
        full."""
        at = positions.start
        while at < positions.stop:
            number, at, shards = self.windows.window(epoch, at)
            for job in self._begin(epoch, number, shards):
                job.result()
        epoch, at = (epoch, at) if at < len(self.windows) else (epoch + 1, 0)
        if epoch < self.epochs:
            number, _, shards = self.windows.window(epoch, at)
            self._begin(epoch, number, shards)

    def read(self, shards: NDArray[np.int64]) -> None:
        """Fetch the features of some shards' own rows together. Raises as a call does, and is closed then."""
        every = [(array, shard) for part in self._arrays.values() for array in part for shard in shards.tolist()]
        with ExitStack() as undo:
            undo.callback(self.close)
            for job in [self._pool.submit(array.fetch, shard) for array, shard in every if array.checksums[shard]]:
                job.result()
            undo.pop_all()

    def _begin(self, epoch: int, number: int, shards: NDArray[np.int64]) -> list[Future[Path]]:
        """Submit a window once; return the futures of its images."""
        if (epoch, number) not in self._begun:
            images = [self._pool.submit(job) for job in self._images(shards)]
            for job in self._features(shards):
                self._pool.submit(_quietly, job)
            while len(self._begun) > 2:
                self._begun.pop(next(iter(self._begun)))
            self._begun[epoch, number] = images
        return self._begun[epoch, number]

    def _images(self, shards: NDArray[np.int64]) -> Iterator[Callable[[], Path]]:
        if self.inputs is not None:
            yield from (partial(self.inputs.fetch, shard) for shard in shards.tolist() if shard in self.inputs.entries)

    def _features(self, shards: NDArray[np.int64]) -> Iterator[Callable[[], Path]]:
        for tower, arrays in self._arrays.items():
            for shard in self._needed(tower, shards.tolist()):
                yield from (partial(array.fetch, shard) for array in arrays if array.checksums[shard])

    def _needed(self, tower: Tower, shards: list[int]) -> set[int]:
        """Return the shards whose features of a tower rows of these shards may have."""
        return {*shards, *(other for own in shards for other in self._beside[tower].get(own, ()))}

    def close(self) -> None:
        """Begin nothing more; what is being fetched is finished."""
        self._pool.shutdown(cancel_futures=True)  # waits: nobody may write into a scratch folder that is gone


def _quietly(job: Callable[[], Path]) -> None:
    # Whoever needs the rows asks for them again, and says what is wrong.
    with suppress(MmkdError, OSError):
        job()
