"""Peaks of memory in a process of its own: tracemalloc counts what every thread of a process allocates."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.base import duplicates
from mmkd.store import FeatureStore
from mmkd.store.convert import importing, rows
from mmkd.store.samples import sample_schema

SMALL, LARGE = 8_000, 80_000


def peak(act: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy held during a call, beyond those before it."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        act()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def inputs(count: int, again: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows with keys like those of the release; the last has the key of row `again`."""
    for row in range(count):
        number = again if again is not None and row == count - 1 else row
        yield {"key": f"folder/{hashlib.sha256(str(number).encode()).hexdigest()}"}


def list_inputs(count: int) -> None:
    """List the rows of an import and let go of them."""
    with importing._spool(inputs(count), sample_schema(())):
        pass


def listing_peak(count: int) -> int:
    """What listing so many rows takes, in passes and batches that both sizes fill."""
    importing._BATCH, duplicates._ROWS_A_PASS = 1024, SMALL
    list_inputs(10)  # imports and caches
    return peak(partial(list_inputs, count))


def choosing_peak(root: Path) -> int:
    """What choosing rows by key takes."""
    store = FeatureStore.open(root)
    keys = ["k4711", "k3", "k4711"]
    assert rows.chosen_rows(store, keys).tolist() == [4711, 3]
    return peak(partial(rows.chosen_rows, store, keys))


def kept_by_pairs(root: Path) -> tuple[int, int]:
    """By how much private memory grew to make the pairs of a store, and to map them."""
    import torch

    from mmkd.distill.pairs import PairSource, open_pairs
    from mmkd.distill.world import World

    def words(texts: list[str]) -> torch.Tensor:
        rows = [[len(word) for word in text.split()][:40] for text in texts]
        return torch.tensor([row + [0] * (41 - len(row)) for row in rows])

    store, cpu = FeatureStore.open(root), World(torch.device("cpu"))
    open_pairs(root.parent / "few", PairSource(store, "row < 9", ("t0",), None, words), cpu)  # imports, threads
    grown = []
    for _ in range(2):
        before = private_bytes()
        pairs = open_pairs(root.parent / "run", PairSource(store, "", ("t0",), None, words), cpu)
        assert len(pairs.rows) > 0.9 * len(store)
        grown.append(private_bytes() - before)
    return grown[0], grown[1]


def private_bytes() -> int:
    """Private memory of this process, mapped files apart."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024
