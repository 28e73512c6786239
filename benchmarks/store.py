"""Random batches out of a store, against the same gather from memory and by other readers of the same files.

Ratios of medians of one run, equal batches for all, warm page cache. `python -P benchmarks/store.py`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore
import torch
import zarr

from mmkd.benchmarks.result import Row, main
from mmkd.distill.teacher_features import as_tensor
from mmkd.store import FeatureStore, Preprocessing, TeacherCard
from mmkd.store.malloc import keep_freed_memory
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

ROWS, DIM, BATCH, REPEATS = 200_000, 512, 4096, 15


def make_store(root: Path) -> None:
    """One teacher of random features."""
    import pyarrow as pa

    columns = {name: [None] * ROWS for name in sample_schema(()).names}
    columns |= {"row": range(ROWS), "key": map(str, range(ROWS)), "status": ["ok"] * ROWS}
    index = pa.table({name: list(values) for name, values in columns.items()}, schema=sample_schema(()))
    record = create_store(root, CorpusRecord(kind="benchmark", location="-", root="/", rows=ROWS, digest="-"), index)
    card = TeacherCard(
        slug="random",
        source="-",
        weights_sha256="-",
        preprocessing=Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,)),
        tokenizer_sha256="-",
        context_length=1,
        dim=DIM,
    )
    add_teacher(root, record, card)
    rng = np.random.default_rng(0)
    for shard, span in enumerate(iter_shards(record)):
        features = rng.normal(size=(len(span), DIM)).astype(np.float16)
        valid = np.full(len(span), 3, dtype=np.uint8)
        write_shard(root, record, card, shard, ShardFeatures(features, features, valid), read_part(root, shard)[1])


def median_seconds(contenders: dict[str, Callable[[np.ndarray], object]]) -> dict[str, float]:
    """Median time of a random batch for each, taken in turn on other rows each time, after one round of warm-up."""
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPEATS + 1):
        for name, act in contenders.items():
            rows = rng.integers(0, ROWS, BATCH)
            started = time.perf_counter()
            act(rows)
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    keep_freed_memory()  # as the trainer does
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        make_store(root)
        started = time.perf_counter()
        store = FeatureStore.open(root)
        first = store.image("random")[:1]
        opened = time.perf_counter() - started
        resident = torch.from_numpy(np.array(store.image("random")))
        mapped = as_tensor(store.image("random"))
        files = {"driver": "file", "path": str(root / "teachers/random/image")}
        ts_array = tensorstore.open({"driver": "zarr3", "kvstore": files}, read=True).result()
        plain = zarr.open_group(root, mode="r")["teachers/random/image"]
        assert np.array_equal(plain[:1], first)
        results = median_seconds(
            {
                "array in memory, torch.index_select": lambda r: resident.index_select(0, torch.from_numpy(r)),
                "mmkd, memory-mapped": lambda r: mapped.index_select(0, torch.from_numpy(r)),
                "tensorstore": lambda r: ts_array[r].read().result(),
                "zarr-python, oindex": lambda r: plain.oindex[np.unique(r)],
            }
        )
    ours = results.pop("mmkd, memory-mapped")
    goals = {"array in memory, torch.index_select": ">= 0.5"}
    what = f"batches of {BATCH:,} of {ROWS:,} rows x {DIM} float16"
    size = BATCH * DIM * 2 / 1e9
    rows = [
        Row(
            what=what,
            against=name,
            value=size / ours,
            reference=size / seconds,
            unit="GB/s",
            goal=goals.get(name, ">= 25"),
        )
        for name, seconds in results.items()
    ]
    return [*rows, Row(what="store opened and first row read", value=opened * 1e3, unit="ms")]


if __name__ == "__main__":
    main(measure)
