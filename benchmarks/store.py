"""Random batches from a store against the same gather from memory and against other readers: ratios of one run.

The page cache is warm throughout: every reader has read all of its rows once before it is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import tensorstore
import zarr
from numpy.typing import NDArray

from mmkd.store import FeatureStore, TeacherCard
from mmkd.store.convert.importing import imported_card
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

Gather = Callable[[NDArray[np.int64]], object]


def build(root: Path, rows: int, card: TeacherCard) -> FeatureStore:
    """A store of random unit-scale features."""
    schema = sample_schema(())
    columns = {name: pa.nulls(rows, schema.field(name).type) for name in schema.names}
    columns |= {"row": pa.array(range(rows)), "key": pa.array(map(str, range(rows))), "status": pa.array(["ok"] * rows)}
    index = pa.table([columns[name] for name in schema.names], schema=schema)
    record = create_store(root, CorpusRecord(kind="bench", location="", root="/", rows=rows, digest=""), index)
    add_teacher(root, record, card)
    rng = np.random.default_rng(0)
    for shard, span in enumerate(iter_shards(record)):
        values = rng.standard_normal((len(span), card.dim), dtype=np.float32).astype(np.float16)
        valid = np.full(len(span), 3, dtype=np.uint8)
        write_shard(root, record, card, shard, ShardFeatures(values, values, valid), read_part(root, shard)[1])
    return FeatureStore.open(root)


def seconds(gather: Gather, batches: list[NDArray[np.int64]]) -> float:
    """Best of three passes over the batches, per row."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for batch in batches:
            gather(batch)
        best = min(best, time.perf_counter() - start)
    return best / sum(map(len, batches))


def main() -> None:
    """Print one line for each reader."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4096)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, options.rows, options.batch) for _ in range(8)]
    few = [batch[:64] for batch in batches[:2]]
    with tempfile.TemporaryDirectory() as folder:
        store = build(Path(folder) / "s", options.rows, imported_card("t", "bench", options.dim, "float16"))
        mapped, path = store.image("t"), Path(folder) / "s/teachers/t/image"
        ram = np.array(mapped)
        plain = zarr.open_array(path, mode="r")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        tensor = tensorstore.open(spec, read=True).result()
        readers: dict[str, tuple[Gather, list[NDArray[np.int64]]]] = {
            "RAM": (lambda rows: ram.take(rows, axis=0), batches),
            "store": (lambda rows: mapped.take(rows, axis=0), batches),
            "tensorstore": (lambda rows: tensor[rows].read().result(), few),
            "zarr oindex": (lambda rows: plain.oindex[rows], few),
        }
        costs = {name: seconds(*reader) for name, reader in readers.items()}
    for name, cost in costs.items():
        rate = options.dim * 2 / cost / 1e9
        sys.stdout.write(f"{name:12} {1 / cost:12,.0f} rows/s {rate:7.3f} GB/s  {costs['RAM'] / cost:.4f} of RAM\n")


if __name__ == "__main__":
    main()
