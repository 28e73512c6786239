"""`mmkd evaluate trust` with its defaults: ten models of 512 dimensions whose features hold a class, a hospital, a
patient (five rows each) and noise. Seconds of the whole command with its pages, and the private memory (not the mapped
pages) of a process that measures one model, at its highest, of a tenth of the rows and of all.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from mmkd.base.process import usable_cores
from mmkd.benchmarks.result import Row, main
from mmkd.evaluate import load_suite
from mmkd.evaluate.trust import measure_trust
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

MODELS, DIM, CLASSES, SITES, EACH = 10, 512, 4, 5, 5
LABELS = ("tissue", "hospital", "patient")


def make_suite(folder: Path, rows: int, models: int = MODELS) -> Path:
    """A store of features and a suite over it; models differ in how strong the hospital is in them."""
    number = np.arange(rows)
    patient, tissue, hospital = number // EACH, number % CLASSES, number // EACH % SITES
    schema = sample_schema(LABELS)
    columns: dict[str, list[Any]] = {name: [None] * rows for name in schema.names}
    columns |= {"row": number.tolist(), "key": [str(row) for row in range(rows)], "status": ["ok"] * rows}
    for name, codes in zip(LABELS, (tissue, hospital, patient), strict=True):
        columns[name] = [f"{name}{code}" for code in codes]
    record = CorpusRecord(kind="benchmark", location="-", root="/", rows=rows, digest="-", labels=LABELS)
    store = create_store(folder / "store", record, pa.table(columns, schema=schema))
    preprocessing = Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,))
    for model in range(models):
        rng = np.random.default_rng(model)
        card = TeacherCard(
            slug=f"teacher{model}", source="-", weights_sha256=str(model), preprocessing=preprocessing,
            tokenizer_sha256="-", context_length=1, dim=DIM,
        )  # fmt: skip
        add_teacher(store, card)
        of_class, of_site = rng.normal(size=(CLASSES, DIM)), rng.normal(size=(SITES, DIM)) * (0.2 + 0.1 * model)
        own = rng.standard_normal((patient[-1] + 1, DIM), dtype=np.float32)
        for shard, span in enumerate(iter_shards(store.record)):
            part = slice(span.start, span.stop)
            image = 0.4 * (of_class[tissue[part]] + of_site[hospital[part]] + 0.5 * own[patient[part]])
            image = (image + rng.standard_normal(image.shape, dtype=np.float32)).astype(np.float16)
            valid = np.full(len(span), 1, dtype=np.uint8)
            write_shard(store, card, shard, ShardFeatures(image, image, valid), read_part(store.root, shard)[1])
    dataset = {"dataset": "slides", "label": "tissue", "group": "patient", "rows": {"test": {}}, "tasks": ["retrieval"]}
    suite = {"suite": "hospitals", "store": "store", "datasets": [dataset]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


def measure_one(suite: Path) -> None:
    measure_trust(load_suite(suite).model_copy(update={"models": ("teacher0",)}), "tissue", "hospital")


def peak_of_one(suite: Path) -> float:
    """MB of a process of its own that measures one model."""
    child = multiprocessing.get_context("spawn").Process(target=measure_one, args=(suite,))
    child.start()
    most = 0.0
    while child.is_alive():
        status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
        most = max(most, int(status.partition("RssAnon:")[2].split()[0] or 0) / 1024) if "RssAnon:" in status else most
        time.sleep(0.02)
    child.join()
    return most


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    rows = 1_000_000 if full else 100_000
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tenth", "all"):
            (Path(folder) / name).mkdir()
        tenth = make_suite(Path(folder) / "tenth", rows // 10, models=1)
        suite = make_suite(Path(folder) / "all", rows)
        options = ["--biology", "tissue", "--confounder", "hospital", "--json"]
        program = "from mmkd.cli.main import main; main()"
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-P", "-c", program, "evaluate", "trust", str(suite), *options],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        found = [
            Row(
                what=f"{rows:,} rows x {MODELS} models of {DIM}, {usable_cores()} cores",
                value=seconds,
                unit="s",
                goal="" if full else "< 60",
            )
        ]
        if Path("/proc/self/status").is_file():
            small, large = peak_of_one(tenth), peak_of_one(suite)
            found.append(
                Row(
                    what=f"private memory, one of {MODELS} models, {rows:,} rows",
                    against=f"{rows // 10:,} rows",
                    value=large,
                    reference=small,
                    unit="MB",
                    goal="<= 1.3",
                )
            )
        return found


if __name__ == "__main__":
    main(measure)
