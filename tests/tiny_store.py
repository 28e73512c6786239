"""Small stores of random features, written with the real writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from mmkd.base.errors import MmkdError
from mmkd.store.card import Preprocessing, TeacherCard
from mmkd.store.layout import TOWERS, Tower
from mmkd.store.record import CorpusRecord, Store, StoreRecord
from mmkd.store.samples import read_part, sample_schema, with_columns, write_part
from mmkd.store.selections import SelectionCard, digest_of, write_selection
from mmkd.store.verify import verify
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard


def make_card(
    slug: str = "alpha", dim: int = 8, weights: str = "00", towers: tuple[Tower, ...] = TOWERS
) -> TeacherCard:
    """A card with made-up identity."""
    look = Preprocessing(image_size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)
    return TeacherCard(
        slug=slug,
        source=f"local-dir:/nowhere/{slug}",
        weights_sha256=weights,
        towers=towers,
        preprocessing=look if "image" in towers else None,
        tokenizer_sha256="11" if "text" in towers else "",
        context_length=16 if "text" in towers else 0,
        dim=dim,
    )


def make_index(rows: int, labels: tuple[str, ...] = ("site",)) -> pa.Table:
    """`rows` pending inputs named k0, k1, ..."""
    columns: dict[str, list[object]] = {name: [None] * rows for name in sample_schema(labels).names}
    columns |= {
        "row": list(range(rows)),
        "key": [f"k{i}" for i in range(rows)],
        "caption": [f"caption {i}" for i in range(rows)],
        "status": ["pending"] * rows,
        "site": [f"s{i % 3}" for i in range(rows)],
    }
    return pa.table(columns, schema=sample_schema(labels))


def make_store(
    root: Path,
    rows: int,
    cards: list[TeacherCard],
    seed: int = 0,
    features: dict[str, np.ndarray] | None = None,
    index: pa.Table | None = None,
) -> tuple[StoreRecord, dict[str, np.ndarray]]:
    """A finished store of `features` (else random ones) and of pending inputs `index`; returns what was written, keyed
    `slug/tower`."""
    corpus = CorpusRecord(kind="test", location="here", root="/nowhere", rows=rows, labels=("site",), digest="d")
    store = create_store(root, corpus, make_index(rows) if index is None else index)
    rng = np.random.default_rng(seed)
    written: dict[str, np.ndarray] = {}
    for card in cards:
        add_teacher(store, card)
        for tower in card.towers:
            given = None if features is None else features[f"{card.slug}/{tower}"]
            random = rng.normal(size=(rows, card.dim)).astype(np.float16)
            written[f"{card.slug}/{tower}"] = random if given is None else given
    for shard, span in enumerate(iter_shards(store.record)):
        table, _ = read_part(root, shard)
        sha = write_part(root, shard, with_columns(table, {"status": ["ok"] * len(span)}))
        for card in cards:
            part = slice(span.start, span.stop)
            part_features = ShardFeatures(
                **{t: written[f"{card.slug}/{t}"][part] if t in card.towers else None for t in TOWERS},
                valid=np.full(len(span), card.all_sound, dtype=np.uint8),
            )
            write_shard(store, card, shard, part_features, sha)
    return store, written


def make_selection(store: Store, name: str, kept: np.ndarray, cards: list[TeacherCard]) -> None:
    """A selection, bool (N, T) with a column for each card, of a rule that says nothing."""
    card = SelectionCard(
        rule={},
        teachers={one.slug: one.digest for one in cards},
        rows=store.record.rows,
        counts={"teachers": {one.slug: {"kept": int(kept[:, t].sum())} for t, one in enumerate(cards)}},
        thresholds={},
        examples={},
        digest=digest_of(kept),
    )
    write_selection(store, name, kept, card)


def found(root: Path) -> bool:
    """Whether verify tells that something is wrong, or refuses as opening would."""
    try:
        return not verify(root).sound
    except MmkdError:
        return True


def every_file(root: Path) -> list[Path]:
    """All files of a store."""
    return sorted(path for path in root.rglob("*") if path.is_file())
