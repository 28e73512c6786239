"""The ten nearest rows of one query, exactly, over mapped float16 rows (warm page cache): NumPy alone, and with faiss
preselecting rows (extra `faiss`). Both give the same rows.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.select import make_store
from mmkd.store import FeatureStore
from mmkd.store.inspect import neighbors
from mmkd.store.inspect.neighbors import faiss_module

DIM, K, ROUNDS, QUERY = 512, 10, 7, 7


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    rows = 2_097_152 if full else 262_144
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", rows, teachers=1)
        store = FeatureStore.open(Path(folder) / "store")
        query = np.array(store.image("teacher0")[QUERY])
        # From how many rows on faiss is asked: none, or all.
        limits = {"numpy": rows + 1} | ({"faiss": 1} if faiss_module() is not None else {})
        seconds: dict[str, list[float]] = {name: [] for name in limits}
        found = {}
        for _ in range(ROUNDS + 1):
            for name, limit in limits.items():
                with patch.object(neighbors, "FAISS_ROWS", limit):
                    started = time.perf_counter()
                    found[name], _ = neighbors.nearest_rows(store, "teacher0", "image", query, K)
                    seconds[name].append(time.perf_counter() - started)
    assert all(np.array_equal(answer, found["numpy"]) for answer in found.values())
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    size = f"{rows:,} rows x {DIM} float16, {os.cpu_count()} cores"
    told = [Row(what=f"{K} nearest of {size}", value=medians["numpy"], unit="s")]
    if "faiss" in medians:
        told.append(
            Row(
                what=f"the same with faiss {faiss_module().__version__}",
                against="NumPy alone",
                value=medians["faiss"],
                reference=medians["numpy"],
                unit="s",
                goal="< 1",
            )
        )
    return told


if __name__ == "__main__":
    main(measure)
