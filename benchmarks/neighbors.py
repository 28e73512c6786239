"""The ten nearest rows of one query, exactly: `store neighbors` over the mapped float16 rows against faiss, whose exact
indexes are given the same rows piece by piece, as a store is larger than memory. Answers must be the same rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.select import make_store
from mmkd.benchmarks.where import peers_python
from mmkd.store import FeatureStore
from mmkd.store.inspect.neighbors import nearest_rows

DIM, K, PIECE, ROUNDS, QUERY = 512, 10, 65_536, 5, 7

FAISS = """
import json, sys, time, faiss, numpy as np
path, k, piece, rounds, query = sys.argv[1], *map(int, sys.argv[2:6])
rows = np.load(path, mmap_mode="r")
wide = rows[query].astype(np.float32)
direction = (wide / np.linalg.norm(wide))[None]

def unit(part):
    part = part.astype(np.float32)
    return part / np.linalg.norm(part, axis=1, keepdims=True)

def flat(part):
    index = faiss.IndexFlatIP(part.shape[1])
    index.add(unit(part))
    return index

def float16(part):
    index = faiss.IndexScalarQuantizer(part.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    index.add_sa_codes(np.ascontiguousarray(part).view(np.uint8))
    return index

def search(build):
    found = []
    for start in range(0, len(rows), piece):
        products, numbers = build(rows[start:start + piece]).search(direction, k)
        found += zip((-products[0]).tolist(), (numbers[0] + start).tolist())
    return [row for _, row in sorted(found)[:k]]

told = {"version": faiss.__version__}
for name, build in (("flat", flat), ("float16", float16)):
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        nearest = search(build)
        seconds.append(time.perf_counter() - started)
    told[name] = {"seconds": seconds, "rows": nearest}
print(json.dumps(told))
"""
NAMES = {"flat": "faiss IndexFlatIP, float32", "float16": "faiss IndexScalarQuantizer, float16 (lengths left out)"}


def faiss_python() -> str | None:
    """A Python that has faiss: that of the peers, or our own."""
    for python in (peers_python(), sys.executable):
        if python and subprocess.run([python, "-c", "import faiss"], capture_output=True, check=False).returncode == 0:
            return str(python)
    return None


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    rows = 1_048_576 if full else 131_072
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", rows, teachers=1)
        features = FeatureStore.open(Path(folder) / "store").image("teacher0")
        np.save(Path(folder) / "rows.npy", features)
        store = FeatureStore.open(Path(folder) / "store")
        seconds = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            nearest, _ = nearest_rows(store, "teacher0", "image", np.array(features[QUERY]), K)
            seconds.append(time.perf_counter() - started)
        own = statistics.median(seconds[1:])
        what = f"{K} nearest of {rows:,} rows x {DIM} float16, {os.cpu_count()} cores"
        python = faiss_python()
        if python is None:
            return [Row(what=what, value=own, unit="s")]
        arguments = [str(Path(folder) / "rows.npy"), *map(str, (K, PIECE, ROUNDS, QUERY))]
        told = json.loads(subprocess.run([python, "-c", FAISS, *arguments], capture_output=True, check=True).stdout)
    assert told["flat"]["rows"] == nearest.tolist()
    return [
        Row(
            what=what,
            against=against,
            value=own,
            reference=statistics.median(told[name]["seconds"]),
            unit="s",
            goal="<= 1",
            note=f"faiss {told['version']}",
        )
        for name, against in NAMES.items()
    ]


if __name__ == "__main__":
    main(measure)
