"""How fast a true-size store opens: 2.9 million rows x 9 teachers as sparse files, in a process of its own.

The files have their full length and no contents, so the store takes no room and its checksums are wrong; nothing
that is measured here looks at them but `available`, whose small `valid` files are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmkd.benchmarks.result import Row, main
from mmkd.store.card import Preprocessing, TeacherCard
from mmkd.store.chunk import CRC_BYTES, encode_chunk, pad_rows
from mmkd.store.encoding import teacher_arrays
from mmkd.store.ledger import LedgerEntry, write_entry
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import sample_schema
from mmkd.store.writer import add_teacher, create_store, iter_shards

ROWS, TEACHERS, DIM, BATCH = 2_900_000, 9, 512, 4096

PROBE = """
import json, resource, sys, time
import numpy as np
import mmkd.store.reader
from mmkd.store import FeatureStore
def rss():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) / 1024
before, started = rss(), time.perf_counter()
marks = {}
def mark(name):
    marks[name] = [time.perf_counter() - started, rss() - before]
store = FeatureStore.open(sys.argv[1])
mark('open')
rows = np.random.default_rng(0).integers(0, len(store), %d)
first = store.image('t0')[rows]
mark('first batch of one teacher')
for slug in store.teachers:
    store.image(slug)[rows[:1]], store.text(slug)[rows[:1]]
mark('a row of every teacher, both towers')
store.available()
mark('available()')
repr(store)
print(json.dumps(marks))
"""


def make_sparse_store(root: Path) -> None:
    """The store: real record, cards, rows, ledger and `valid`; feature chunks of full length without contents."""
    columns = {name: pa.nulls(ROWS, kind) for name, kind in zip(*_schema(), strict=True)}
    columns |= {"row": pa.array(range(ROWS)), "key": pa.array(map(str, range(ROWS)))}
    columns["status"] = pa.array(["ok"] * ROWS)
    index = pa.table(columns)
    record = create_store(root, CorpusRecord(kind="benchmark", location="-", root="/", rows=ROWS, digest="-"), index)
    preprocessing = Preprocessing(image_size=(1, 1), mean=(0.5,), std=(0.5,))
    for number in range(TEACHERS):
        card = TeacherCard(
            slug=f"t{number}", source="-", weights_sha256="-", preprocessing=preprocessing, tokenizer_sha256="-",
            context_length=1, dim=DIM,
        )  # fmt: skip
        add_teacher(root, record, card)
        for shard, span in enumerate(iter_shards(record)):
            data, crc = encode_chunk(pad_rows(np.full(len(span), 3, np.uint8), record.rows_per_shard, 0))
            for array in teacher_arrays("float16", DIM):
                path = root / array.chunk(card.slug, shard)
                path.parent.mkdir(parents=True, exist_ok=True)
                if array.name == "valid":
                    path.write_bytes(data)
                else:
                    with path.open("wb") as file:
                        file.truncate(array.chunk_bytes(record.rows_per_shard) + CRC_BYTES)
            entry = LedgerEntry(
                shard=shard, teacher=card.slug, teacher_digest=card.digest, rows=len(span), image_rows=len(span),
                text_rows=len(span), image_crc32c="0" * 8, text_crc32c="0" * 8, valid_crc32c=crc,
                samples_sha256="0" * 64,
            )  # fmt: skip
            write_entry(root, entry)


def _schema() -> tuple[list[str], list[pa.DataType]]:
    schema = sample_schema(())
    return schema.names, schema.types


def probe(root: Path) -> dict[str, list[float]]:
    """Seconds since the start and MB of memory gained, in a fresh process whose imports are done."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE % BATCH, str(root)], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    marks: dict[str, list[float]] = json.loads(done.stdout)
    return marks


def measure(full: bool) -> list[Row]:
    """Rows for the page; the size is the true one either way."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        make_sparse_store(root)
        files = sum(path.is_file() for path in root.rglob("*"))
        note = f"{ROWS:,} rows x {TEACHERS} teachers x {DIM} float16, {files:,} sparse files"
        goals = {"first batch of one teacher": "< 1"}
        return [
            Row(
                what=f"{name}, since the start",
                value=seconds,
                unit="s",
                goal=goals.get(name, ""),
                note=f"{memory:.0f} MB more memory; {note}",
            )
            for name, (seconds, memory) in probe(root).items()
        ]


if __name__ == "__main__":
    main(measure)
