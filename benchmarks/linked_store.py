"""A store of any number of rows that takes the room of one shard: all whole shards are links to the same files.

Every file has its full length, real values and a true checksum, so that whatever reads the store does all its work;
only the page cache sees fewer pages than a store of that size has, and rows repeat from shard to shard.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.ledger import LedgerEntry, write_entry
from mmkd.store.record import CorpusRecord, StoreRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

MODALITIES = ("CT", "MRI", "X-ray", "pathology", "endoscopy", "ultrasound", "dermatology", "fundus", "OCT")
WORDS = (
    "axial coronal sagittal contrast enhanced section shows mass lesion nodule left right upper lower lobe lung liver "
    "kidney stained haematoxylin eosin magnification arrow indicates region of patient with after before treatment "
    "figure panel scan image tissue cells tumour normal bone joint retina mucosa ulcer biopsy follow up"
)


def sample_rows(rows: int) -> pa.Table:
    """Distinct keys and captions of eight to thirty words, an image of its own for each row."""
    rng = np.random.default_rng(0)
    words = np.array(WORDS.split())
    lengths = rng.integers(8, 31, rows)
    drawn = words[rng.integers(0, len(words), int(lengths.sum()))]
    ends = lengths.cumsum()
    captions = [" ".join(drawn[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    schema = sample_schema(())
    known = {
        "row": pa.array(range(rows), pa.int64()),
        "key": pa.array([f"PMC{row:09d}_F1" for row in range(rows)]),
        "caption": pa.array([f"{caption} {row}" for row, caption in enumerate(captions)]),
        "modality": pa.array([MODALITIES[row % len(MODALITIES)] for row in range(rows)]),
        "uri": pa.array([f"{row // 10_000:05d}.tar" for row in range(rows)]),
        "offset": pa.array([row % 10_000 * 60_000 for row in range(rows)], pa.int64()),
        "length": pa.array([58_000] * rows, pa.int64()),
        "status": pa.array(["ok"] * rows),
        "width": pa.array([500] * rows, pa.int32()),
        "height": pa.array([400] * rows, pa.int32()),
        "image_sha256": pa.array([f"{row:064x}" for row in range(rows)]),
    }
    return pa.table({name: known.get(name, pa.nulls(rows, schema.field(name).type)) for name in schema.names})


def make_linked_store(root: Path, rows: int, teachers: int, dim: int) -> StoreRecord:
    """Lay it out: the first shard and a last one that is not full are written, the others are links to the first."""
    index = sample_rows(rows)
    store = create_store(root, CorpusRecord(kind="benchmark", location="-", root="/", rows=rows, digest="-"), index)
    del index
    parts = {shard: read_part(root, shard)[1] for shard, _ in enumerate(iter_shards(store.record))}
    rng = np.random.default_rng(0)
    for number in range(teachers):
        card = TeacherCard(
            slug=f"t{number}", source="-", weights_sha256=str(number), dim=dim, tokenizer_sha256="-", context_length=77,
            preprocessing=Preprocessing(image_size=(224, 224), mean=(0.5,), std=(0.5,)),
        )  # fmt: skip
        add_teacher(store, card)
        first: LedgerEntry | None = None
        for shard, span in enumerate(iter_shards(store.record)):
            if first is not None and len(span) == first.rows:
                _link(root, card, shard)
                write_entry(root, first.model_copy(update={"shard": shard, "samples_sha256": parts[shard]}))
                continue
            image = rng.standard_normal((len(span), dim), dtype=np.float32)
            text = image + 3 * rng.standard_normal((len(span), dim), dtype=np.float32)
            valid = np.full(len(span), 3, dtype=np.uint8)
            valid[rng.random(len(span)) < 0.01] = 2  # one image in a hundred could not be read
            entry = write_shard(store, card, shard, ShardFeatures(image, text, valid), parts[shard])
            first = first or entry
    return store.record


def _link(root: Path, card: TeacherCard, shard: int) -> None:
    for array in card.arrays:
        place = root / array.loose(card.slug, shard)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(root / array.loose(card.slug, 0), place)
