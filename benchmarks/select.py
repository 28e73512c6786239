"""Selection rules over a scaled store: seconds per rule, and minutes for 2.9 million rows and nine teachers.

The cost of a rule is the same for every row (pools and blocks of fixed size), so the time is scaled by the ratio of
pairs; a run at half the rows says whether that holds. Features are in the page cache: on a machine where they are
not, reading 54 GB adds its own time.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmkd.benchmarks.result import Row, main
from mmkd.store import FeatureStore, Preprocessing, TeacherCard
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.selection import SelectionRule, load_rule
from mmkd.store.selection.compute import judge, pairs_to_judge
from mmkd.store.selection.rules import find_rule
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

TEACHERS, DIM = 9, 512
TRUE_ROWS = 2_900_000
RULES = ("cosine_fifth", "retrieval_rank", "best_three", "agreement", "mmkd_paper_share")


def make_store(root: Path, rows: int, teachers: int = TEACHERS) -> None:
    """Random features of some teachers; texts are images with noise, so that rules have something to find."""
    columns: dict[str, list[Any]] = {name: [None] * rows for name in sample_schema(()).names}
    columns |= {"row": list(range(rows)), "key": [str(row) for row in range(rows)], "status": ["ok"] * rows}
    columns["caption"] = [f"caption {row}" for row in range(rows)]
    columns["modality"] = [("CT", "MRI", "pathology")[row % 3] for row in range(rows)]
    index = pa.table(columns, schema=sample_schema(()))
    store = create_store(root, CorpusRecord(kind="benchmark", location="-", root="/", rows=rows, digest="-"), index)
    preprocessing = Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,))
    rng = np.random.default_rng(0)
    for number in range(teachers):
        card = TeacherCard(
            slug=f"teacher{number}", source="-", weights_sha256=str(number), preprocessing=preprocessing,
            tokenizer_sha256="-", context_length=1, dim=DIM,
        )  # fmt: skip
        add_teacher(store, card)
        for shard, span in enumerate(iter_shards(store.record)):
            image = rng.standard_normal((len(span), DIM), dtype=np.float32)
            text = image + 3 * rng.standard_normal((len(span), DIM), dtype=np.float32)
            valid = np.full(len(span), 3, dtype=np.uint8)
            features = ShardFeatures(image.astype(np.float16), text.astype(np.float16), valid)
            write_shard(store, card, shard, features, read_part(root, shard)[1])


def seconds(store: FeatureStore, rule: SelectionRule) -> float:
    """Of judging every pair; best of two, the first of which fills the page cache."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        judge(pairs_to_judge(store, rule), rule)
        taken.append(time.perf_counter() - started)
    return min(taken)


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    rows = 262_144 if full else 16_384
    found = []
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for count in (rows // 2, rows):
            make_store(Path(folder) / str(count), count)
            stores[count] = FeatureStore.open(Path(folder) / str(count))
        for name in RULES:
            rule = load_rule(find_rule(name))
            half, whole = (seconds(store, rule) for store in stores.values())
            minutes = f"{whole * TRUE_ROWS / rows / 60:.1f} min for {TRUE_ROWS:,} rows if that holds"
            found.append(
                Row(
                    what=f"rule `{name}` over {rows:,} rows x {TEACHERS} teachers of {DIM}",
                    against="half the rows",
                    value=whole,
                    reference=half,
                    unit="s",
                    note=minutes,
                )
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [*found, Row(what="peak memory of the process", value=peak, unit="MB")]


if __name__ == "__main__":
    main(measure)
