"""Small stores with rows in every state, several corpora and shards that were not extracted; drawn by seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from tiny_store import make_card

from mmkd.store import FeatureStore
from mmkd.store.layout import TOWERS, Tower
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.samples import read_part, sample_schema, with_columns, write_part
from mmkd.store.writer import (
    ShardFeatures,
    add_teacher,
    append_rows,
    create_store,
    first_new_row,
    iter_shards,
    write_shard,
)

STATES = (("ok", None), ("partial", "image: file not found"), ("failed", "image: file not found; caption: empty"))


def listed(rng: np.random.Generator, first: int, rows: int, labels: tuple[str, ...]) -> pa.Table:
    """Pending inputs from grid row `first` on; some texts are hostile, some values null."""
    texts = ["", " ", "a|b", "c\nd", "x\u2028y", "'", "1", "None", "12.0", "日本", None]
    columns: dict[str, list[object]] = {name: [None] * rows for name in sample_schema(labels).names}
    columns |= {
        "row": list(range(first, first + rows)),
        "key": [f"k{first + i}" for i in range(rows)],
        "caption": [texts[i] for i in rng.integers(0, len(texts), rows)],
        "modality": [texts[i] for i in rng.integers(0, len(texts), rows)],
        "uri": [f"p/{first + i}.png" if i % 3 else None for i in range(rows)],
        "offset": [int(i) if i % 2 else None for i in range(rows)],
        "length": [10 if i % 2 else None for i in range(rows)],
        "status": ["pending"] * rows,
    }
    for label in labels:
        columns[label] = [texts[i] for i in rng.integers(0, len(texts), rows)]
    return pa.table(columns, schema=sample_schema(labels))


def random_store(root: Path, seed: int, *, corpora: int = 1, teachers: int = 2, complete: bool = False) -> FeatureStore:
    """A store whose corpora have other labels; without `complete`, a shard may lack a teacher, or be pending."""
    rng = np.random.default_rng(seed)
    store: Store | None = None
    for number in range(corpora):
        rows = int(rng.integers(1, 600))
        labels = ("site", f"own_{number}")
        first = 0 if store is None else first_new_row(store.record)
        corpus = CorpusRecord(
            kind="test", location=f"c{number}", root="/img", rows=rows, labels=labels, digest=f"{number}"
        )
        index = listed(rng, first, rows, labels)
        store = create_store(root, corpus, index) if store is None else append_rows(store, corpus, index)
    assert store is not None
    # Every third teacher has an image tower only, or a text tower only.
    kinds: list[tuple[Tower, ...]] = [TOWERS, TOWERS, TOWERS, TOWERS, ("image",), ("text",)]
    cards = [
        make_card(f"t{i}", int(rng.integers(2, 6)), towers=kinds[int(rng.integers(len(kinds)))])
        for i in range(teachers)
    ]
    for card in cards:
        add_teacher(store, card)
    for shard, span in enumerate(iter_shards(store.record)):
        done = [card for card in cards if complete or rng.random() < 0.8]
        if not done:
            continue
        rows = len(span)
        states = [STATES[i] for i in rng.integers(0, 3, rows)]
        table = with_columns(
            read_part(root, shard)[0],
            {
                "status": [status for status, _ in states],
                "reason": [reason for _, reason in states],
                "width": [int(i) if i else None for i in rng.integers(0, 9, rows)],
                "height": [int(i) if i else None for i in rng.integers(0, 9, rows)],
                "image_sha256": [f"{i:x}" if i % 2 else None for i in range(rows)],
            },
        )
        sha = write_part(root, shard, table)
        for card in done:
            drawn = {tower: rng.normal(size=(rows, card.dim)).astype(np.float16) for tower in card.towers}
            bits = rng.integers(0, 4, rows).astype(np.uint8)
            write_shard(store, card, shard, ShardFeatures(drawn.get("image"), drawn.get("text"), bits), sha)
    return FeatureStore.open(root)


def compare(found: FeatureStore, expected: FeatureStore, rows: np.ndarray, slugs: list[str]) -> None:
    """Hold every field of `found` to these rows of `expected`."""
    table = expected.sample_table().take(pa.array(rows)).to_pylist()
    assert found.sample_table().to_pylist() == [row | {"row": i} for i, row in enumerate(table)]
    assert [span.corpus.root for span in found.record.spans()] == [expected.record.corpus.root]
    for slug in slugs:
        assert found.card(slug) == expected.card(slug)
        assert np.array_equal(found.valid(slug), expected.valid(slug)[rows])
        for tower in expected.card(slug).towers:
            ours, theirs = found.features(slug, tower)[:], expected.features(slug, tower)[rows]  # type: ignore[arg-type]
            assert np.array_equal(ours, theirs, equal_nan=True)
