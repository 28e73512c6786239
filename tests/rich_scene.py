"""A store in which rows have all that training may draw for them: views, further captions, a selection, lone rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from caption_corpus import write_jsonl
from tiny_store import make_card, make_selection

from mmkd.base.images.views import Views
from mmkd.extract.corpora import open_corpus
from mmkd.extract.derived import append_pictures
from mmkd.extract.index import create_indexed_store
from mmkd.store import FeatureStore
from mmkd.store.layout import IMAGE_SOUND, TEXT_SOUND
from mmkd.store.record import Store
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.writer import ShardFeatures, add_teacher, iter_shards, write_shard

ROWS, VIEWS = 280, Views(count=2, seed=5, area=(0.3, 0.8), flip=True)
SLUGS = ("alpha", "beta")


def kind(row: int) -> str:
    """Of ten rows eight are pairs."""
    return {3: "image", 7: "text"}.get(row % 10, "pair")


def write_rich_store(root: Path) -> FeatureStore:
    """`root/rich`: two shards of rows, in which pairs have two further captions and images two views, random features
    of two teachers, and a selection `half` of pairs, other ones for each teacher."""
    captions = [[f"own {row}", "seen in many", f"more {row}"] for row in range(ROWS)]
    rows: list[dict[str, object]] = [
        {
            "key": f"k{row}",
            "image": "" if kind(row) == "text" else f"{row % 4}.png",
            "caption": {"image": [], "text": captions[row][:1], "pair": captions[row]}[kind(row)],
        }
        for row in range(ROWS)
    ]
    corpus = write_jsonl(root / "rich-corpus", rows, further={}, kind_column=None)
    create_indexed_store(open_corpus(str(corpus)), root / "rich")
    append_pictures(Store.open(root / "rich"), VIEWS, lambda line: None)
    store, rng = FeatureStore.open(root / "rich"), np.random.default_rng(0)
    cards = [make_card(slug, dim) for slug, dim in zip(SLUGS, (24, 32), strict=True)]
    for card in cards:
        add_teacher(store, card)
    for shard, span in enumerate(iter_shards(store.record)):
        table, _ = read_part(store.root, shard)
        kinds = [kind(row) if row < ROWS else "pair" for row in span]
        faults = {"image": "caption: empty", "text": "image: not given", "pair": None}
        said = {
            "status": ["ok" if one == "pair" else "partial" for one in kinds],
            "reason": [faults[one] for one in kinds],
            "width": [None if one == "text" else 64 for one in kinds],
        }
        sha = write_part(store.root, shard, with_columns(table, said))
        sound = np.array([[one != "text", one != "image"] for one in kinds]) @ np.array([IMAGE_SOUND, TEXT_SOUND])
        for card in cards:
            towers = store.record.asked_towers(shard, card)
            values = [
                rng.normal(size=(len(span), card.dim)) if tower in towers else None for tower in ("image", "text")
            ]
            write_shard(store, card, shard, ShardFeatures(*values, sound.astype(np.uint8)), sha)
    make_selection(store, "half", rng.random((len(store), 2)) < 0.5, cards)
    return FeatureStore.open(root / "rich")
