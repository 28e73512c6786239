"""A folded store of any number of rows that takes the room of two packs of one teacher: all others are links to them.

Every file has its full length, real values, a sound index and true checksums, so that whatever reads the store does all
its work; only the page cache sees fewer pages than a store of that size has, and the rows of a shard repeat from shard
to shard and from teacher to teacher. Sample parts are files of their own: keys and places are distinct, and captions
in stores of up to 10 million rows; larger ones repeat 512 captions, because the parts would take longer to write than
all else takes to measure.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkd.base.files import remove_file, write_parts_atomically
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.encoding import ArraySpec
from mmkd.store.fold import fold
from mmkd.store.hierarchy import group_document, write_document
from mmkd.store.layout import (
    FOLDED_SHARDS,
    FORMAT_VERSION,
    folded_entries,
    rows_per_shard,
    shard_count,
    shards_per_pack,
)
from mmkd.store.ledger import LedgerEntry, write_folded
from mmkd.store.record import CorpusRecord, Store, StoreRecord
from mmkd.store.samples import sample_schema, write_part
from mmkd.store.stored_array import encode_index
from mmkd.store.writer import ShardFeatures, add_teacher, write_shard

MODALITIES = ("CT", "MRI", "X-ray", "pathology", "endoscopy", "ultrasound", "dermatology", "fundus", "OCT")
DISTINCT = 10_000_000
"""Rows up to which all captions differ."""
WORDS = (
    "axial coronal sagittal contrast enhanced section shows mass lesion nodule left right upper lower lobe lung liver "
    "kidney stained haematoxylin eosin magnification arrow indicates region of patient with after before treatment "
    "figure panel scan image tissue cells tumour normal bone joint retina mucosa ulcer biopsy follow up"
)


@cache
def template(rows: int) -> pa.Table:
    """Captions of eight to thirty words, the same in each shard but for the row's number behind them."""
    rng = np.random.default_rng(0)
    words = np.array(WORDS.split())
    lengths = rng.integers(8, 31, rows)
    drawn = words[rng.integers(0, len(words), int(lengths.sum()))]
    ends = lengths.cumsum()
    captions = [" ".join(drawn[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    schema = sample_schema(())
    known = {
        "caption": pa.array(captions),
        "modality": pa.array([MODALITIES[row % len(MODALITIES)] for row in range(rows)]),
        "length": pa.array([58_000] * rows, pa.int64()),
        "status": pa.array(["ok"] * rows),
        "width": pa.array([500] * rows, pa.int32()),
        "height": pa.array([400] * rows, pa.int32()),
        "image_sha256": pa.array([f"{row:064x}" for row in range(rows)]),
    }
    return pa.table({name: known.get(name, pa.nulls(rows, schema.field(name).type)) for name in schema.names})


def sample_rows(rows: range, per_shard: int, distinct: bool, prefix: str = "PMC") -> pa.Table:
    """Rows with distinct keys and, where `distinct`, captions; an image of its own for each."""
    made = template(per_shard).slice(0, len(rows))
    numbers = pa.array(rows, pa.int64())
    words = pc.cast(numbers, pa.string())
    columns = {
        "row": numbers,
        "key": pc.binary_join_element_wise(prefix, pc.utf8_lpad(words, 10, "0"), ""),
        "uri": pc.binary_join_element_wise(pc.cast(pc.divide(numbers, 10_000), pa.string()), ".tar", ""),
        "offset": pc.multiply(pc.subtract(numbers, pc.multiply(pc.divide(numbers, 10_000), 10_000)), 60_000),
    }
    captions = made["caption"].combine_chunks()
    if distinct:
        columns["caption"] = pc.binary_join_element_wise(captions, words, " ")
    else:
        columns["caption"] = captions.take(pa.array(np.arange(len(rows)) % min(512, len(rows))))
        columns["image_sha256"] = pa.nulls(len(rows), pa.string())
    for name, column in columns.items():
        made = made.set_column(made.schema.get_field_index(name), name, column)
    return made.cast(sample_schema(())).combine_chunks()


def _part(root: Path, record: StoreRecord, prefix: str, shard: int) -> str:
    rows = sample_rows(record.shard_rows(shard), record.rows_per_shard, record.rows <= DISTINCT, prefix)
    return write_part(root, shard, rows)


def _parts(root: Path, record: StoreRecord, prefix: str) -> list[str]:
    """Write all sample parts; return their SHA-256."""
    shards, write = range(shard_count(record.rows, record.rows_per_shard)), partial(_part, root, record, prefix)
    if len(shards) < 100:
        return list(map(write, shards))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(write, shards, chunksize=32))


def make_linked_store(
    root: Path, rows: int, teachers: int, dim: int, workers: int = 1, prefix: str = "PMC"
) -> StoreRecord:
    """Lay it out: the packs of the first teacher that hold the first and the last shard are written, all others are
    links to them. `workers`: of the extraction that chose the rows of a shard; `prefix`: of all keys."""
    per_shard = rows_per_shard(rows, workers)
    record = StoreRecord(
        format=FORMAT_VERSION, rows=rows, rows_per_shard=per_shard, shards_per_pack=shards_per_pack(rows, per_shard),
        corpus=CorpusRecord(kind="benchmark", location="-", root="/", rows=rows, digest="-"),
        created="2026-01-01T00:00:00+00:00", versions={},
    )  # fmt: skip
    parts, store = _parts(root, record, prefix), Store(root, record)
    write_document(root / "zarr.json", group_document(record.model_dump(mode="json")))
    cards = [
        TeacherCard(
            slug=f"t{number}", source="-", weights_sha256=str(number), dim=dim, tokenizer_sha256="-", context_length=77,
            preprocessing=Preprocessing(image_size=(224, 224), mean=(0.5,), std=(0.5,)),
        )
        for number in range(teachers)
    ]  # fmt: skip
    for card in cards:
        add_teacher(store, card)
    last, rng = len(parts) - 1, np.random.default_rng(0)
    written: dict[int, LedgerEntry] = {}
    for shard in sorted({0, last}):
        count = len(record.shard_rows(shard))
        image = rng.standard_normal((count, dim), dtype=np.float32)
        text = image + 3 * rng.standard_normal((count, dim), dtype=np.float32)
        valid = np.full(count, 3, dtype=np.uint8)
        valid[rng.random(count) < 0.01] = 2  # one image in a hundred could not be read
        written[shard] = write_shard(store, cards[0], shard, ShardFeatures(image, text, valid), parts[shard])
    for spec in cards[0].arrays:
        _packs(store, [card.slug for card in cards], spec, last)
    for path in (root / "ledger").iterdir():
        remove_file(path)
    for first in range(0, last + 1, FOLDED_SHARDS):
        shards = range(first, min(first + FOLDED_SHARDS, last + 1))
        write_folded(root / folded_entries(first), _entries(cards, shards, written, parts))
    assert fold(store).damaged == []  # the sample parts; all else is
    return record


def _entries(
    cards: list[TeacherCard], shards: range, written: dict[int, LedgerEntry], parts: list[str]
) -> Iterator[LedgerEntry]:
    for shard in shards:
        for card in cards:
            own = {"shard": shard, "teacher": card.slug, "teacher_digest": card.digest, "samples_sha256": parts[shard]}
            yield written.get(shard, written[0]).model_copy(update=own)


def _packs(store: Store, slugs: list[str], spec: ArraySpec, last: int) -> None:
    """Pack one array of the first teacher, and link all other packs of all teachers to it."""
    loose = [store.root / spec.loose(slugs[0], shard) for shard in sorted({0, last})]
    bodies = [path.read_bytes()[:-4] for path in loose]
    per_pack, size = store.record.shards_per_pack, len(bodies[0])
    made: dict[int, Path] = {}
    for number in range(last // per_pack + 1):
        chunks = min(per_pack, last + 1 - number * per_pack)
        ends = number == last // per_pack
        for slug in slugs:
            place = Path(str(store.root / spec.pack(slug, number)))
            place.parent.mkdir(parents=True, exist_ok=True)
            if ends in made:
                os.link(made[ends], place)
                continue
            index = encode_index([at < chunks for at in range(per_pack)], size)
            own = [bodies[0]] * (chunks - 1) + [bodies[-1] if ends else bodies[0]]
            write_parts_atomically(place, [*own, index])
            made[ends] = place
    for path in loose:
        remove_file(path)
