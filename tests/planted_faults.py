"""A store in which every fault that inspection looks for was planted at a known place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tiny_store import make_card, make_index

from mmkd.store.chunk import encode_chunk, pad_rows
from mmkd.store.encoding import tower_arrays
from mmkd.store.ledger import LedgerEntry, write_entry
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

ROWS, DIM = 1100, 32
SCRIPT = "<script>alert(1)</script> & <b>bold</b>"
HOLE, NAN_ROW, ZERO_ROW, TWINS = 3, 40, 41, (10, 20)
DEAD, CONSTANT = 5, 7
TEACHERS = ("base", "broken", "dead", "holed", "noise", "rotated", "same", "shifted")


def planted_arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Image and text features by teacher, float16 (ROWS, DIM)."""
    rng = np.random.default_rng(3)
    signal = rng.normal(size=(ROWS, DIM)) + 0.5
    image = (signal + 0.3 * rng.normal(size=signal.shape)).astype(np.float16)
    text = (signal + 0.3 * rng.normal(size=signal.shape)).astype(np.float16)
    image[TWINS[1]] = image[TWINS[0]]
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    broken, dead = image.copy(), image.copy()
    broken[NAN_ROW, 3], broken[ZERO_ROW] = np.nan, 0
    dead[:, DEAD], dead[:, CONSTANT] = 0, 0.25
    unrelated = [rng.normal(size=signal.shape).astype(np.float16) for _ in range(2)]
    return {
        "base": (image, text),
        "broken": (broken, text),
        "dead": (dead, text),
        "holed": (image + np.float16(0.2) * unrelated[0], text),
        "noise": (unrelated[0], unrelated[1]),
        "rotated": ((image @ turn).astype(np.float16), (text @ turn).astype(np.float16)),
        "same": (image, text),
        # Row r holds the caption of row r - 1: images fit the caption one row further on.
        "shifted": (image, np.roll(text, 1, axis=0)),
    }


def make_faults(folder: Path, teachers: tuple[str, ...] = TEACHERS) -> Path:
    """Write the store and, beside it, a corpus of eight pictures (the other rows' files are not there)."""
    root, pictures = folder / "store", folder / "corpus"
    pictures.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40 + i, 30), (30 * i, 80, 200)).save(pictures / f"{i}.png")
    index = with_columns(
        make_index(ROWS),
        {
            "uri": [f"{i}.png" for i in range(ROWS)],
            "caption": [SCRIPT, *(f"caption {i}" for i in range(1, ROWS))],
            "modality": [("radiology", "pathology")[i % 2] for i in range(ROWS)],
        },
    )
    corpus = CorpusRecord(kind="test", location="here", root=str(pictures), rows=ROWS, labels=("site",), digest="d")
    store = create_store(root, corpus, index)
    arrays = planted_arrays()
    sound = {slug: image for slug, (image, _) in arrays.items()} | {"broken": arrays["base"][0]}
    cards = {slug: make_card(slug, DIM) for slug in teachers}
    for card in cards.values():
        add_teacher(store, card)
    for shard, span in enumerate(iter_shards(store.record)):
        table, _ = read_part(root, shard)
        sha = write_part(root, shard, _outcome(table))
        for slug, card in cards.items():
            if (slug, shard) != ("holed", HOLE):
                image, text = (values[span.start : span.stop] for values in arrays[slug])
                bits = np.full(len(span), 3, dtype=np.uint8)
                entry = write_shard(
                    store,
                    card,
                    shard,
                    ShardFeatures(sound[slug][span.start : span.stop], text, bits),
                    sha,
                )
                if slug == "broken":
                    _spoil(store, entry, image)
    return root


def _spoil(store: Store, entry: LedgerEntry, image: np.ndarray) -> None:
    """Put values into a chunk that this package's writer refuses, as another writer might, and vouch for them."""
    (spec, *_) = tower_arrays("image", "float16", DIM)
    data, crc = encode_chunk(pad_rows(image, store.record.rows_per_shard, spec.fill))
    (store.root / spec.loose(entry.teacher, entry.shard)).write_bytes(data)
    write_entry(store.root, entry.model_copy(update={"image_crc32c": crc}))


def _outcome(table: pa.Table) -> pa.Table:
    """All rows sound but every fiftieth, whose image was cut off."""
    rows = table["row"].to_pylist()
    failed = [row % 50 == 49 for row in rows]
    return with_columns(
        table,
        {
            "status": ["partial" if bad else "ok" for bad in failed],
            "reason": ["image: truncated" if bad else None for bad in failed],
        },
    )
