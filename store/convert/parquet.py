"""Sample rows and features in one Parquet table, as Hugging Face `datasets` reads it: `data/train-*.parquet`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmkd.base.files import write_atomically
from mmkd.store.array import consecutive
from mmkd.store.layout import SOUND_BIT
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import in_rows
from mmkd.store.writer import iter_shards


def export_parquet(store: FeatureStore, out: Path) -> int:
    """Write one file for each shard; returns how many. Columns: those of the sample table, then `<slug>_image` and
    `<slug>_text` as fixed-size lists; null where missing. `_features` is added to the name where a label has it."""
    valid = {slug: store.valid(slug) for slug in store.teachers}
    for shard, span in enumerate(iter_shards(store.record)):
        table = store.sample_table(filter=in_rows(span))
        rows = slice(span.start, span.stop)
        for slug in store.teachers:
            for tower, bit in SOUND_BIT.items():
                column = _vectors(consecutive(store.features(slug, tower), rows), (valid[slug][rows] & bit) > 0)
                name = f"{slug}_{tower}"
                while name in table.column_names:  # a label of this name
                    name += "_features"
                table = table.append_column(name, column)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(out / "data" / f"train-{shard:05d}-of-{store.shards:05d}.parquet", buffer.getbuffer())
    return store.shards


def _vectors(values: NDArray[np.floating[Any]], sound: NDArray[np.bool_]) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(~sound))
