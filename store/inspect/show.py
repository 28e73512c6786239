"""Details of one row or one shard."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkd.base.arrays import Ints, Singles
from mmkd.store.inspect.neighbors import nearest_rows
from mmkd.store.inspect.rows import sample_rows
from mmkd.store.inspect.sampling import draw_inputs, truly_sound, unit
from mmkd.store.layout import PAIR_SOUND, SOUND_BIT, TOWERS, Tower
from mmkd.store.ledger import LedgerEntry
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import shard_table

RANDOM_ROWS = 999
"""Other rows that the row's own counterpart is ranked among: a pool of 1000 with itself, as in the statistics."""
SEARCHED_ROWS = 1 << 17
"""Rows searched for neighbors, at most: a tenth of a second per teacher. `mmkd store neighbors` searches all."""
FAILURES = 20


@dataclass(frozen=True)
class Neighbor:
    """A row near another."""

    row: int
    key: str
    cosine: float
    caption: str | None


@dataclass(frozen=True)
class TeacherView:
    """One teacher's results for a row. Numbers are None where a feature is missing."""

    slug: str
    extracted: bool
    """True if the row's shard has a ledger entry."""
    image_norm: float | None
    text_norm: float | None
    cosine: float | None
    caption_rank: int | None
    image_rank: int | None
    """Rank among `ranked_among` by cosine with the row's image, or caption; 1 is best."""
    ranked_among: int
    neighbors: tuple[Neighbor, ...]
    """Nearest other rows by image, or by caption where the row has no sound image."""
    neighbors_by: Tower | None


@dataclass(frozen=True)
class RowView:
    """A row: its sample, where its picture is, and its features by each teacher."""

    row: int
    shard: int
    sample: dict[str, Any]
    corpus_root: str
    searched: int
    """Rows that neighbors were looked for in; fewer than the store's when that is large."""
    teachers: tuple[TeacherView, ...]


@dataclass(frozen=True)
class ShardView:
    """A shard: rows by status, its teachers, the first failures."""

    shard: int
    first_row: int
    last_row: int
    status: dict[str, int]
    reasons: dict[str, int]
    entries: dict[str, LedgerEntry | None]
    failures: tuple[dict[str, Any], ...]


def view_row(
    store: FeatureStore, row: int, teachers: Sequence[str] | None = None, k: int = 5, seed: int = 0
) -> RowView:
    """Collect details of one row from these teachers, or all; `seed` draws the rows for ranks and, in a large store,
    neighbors. Raises UserError for an unknown teacher; CorruptStoreError."""
    others = np.setdiff1d(draw_inputs(store, RANDOM_ROWS + 1, seed), [row])[:RANDOM_ROWS]
    searched = draw_inputs(store, SEARCHED_ROWS, seed)
    slugs = tuple(store.teachers) if teachers is None else tuple(teachers)
    return RowView(
        row=row,
        shard=row // store.record.rows_per_shard,
        sample=sample_rows(store, [row]).to_pylist()[0],
        corpus_root=str(store.record.image_root(row)),
        searched=len(searched),
        teachers=tuple(_view_teacher(store, slug, row, others, searched, k) for slug in slugs),
    )


def view_shard(store: FeatureStore, shard: int) -> ShardView:
    """Collect details of one shard. Raises CorruptStoreError if the sample part cannot be read."""
    table = shard_table(store, shard)
    bad = table.filter(pc.is_in(table["status"], pa.array(["failed", "partial"])))
    first = shard * store.record.rows_per_shard
    return ShardView(
        shard=shard,
        first_row=first,
        last_row=first + len(table) - 1,
        status=_counts(table["status"]),
        reasons=_counts(bad["reason"]),
        entries={slug: store.ledger.get((shard, slug)) for slug in store.teachers},
        failures=tuple(bad.select(["row", "key", "status", "reason"]).slice(0, FAILURES).to_pylist()),
    )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return dict(sorted(Counter(column.drop_null().to_pylist()).items()))


def _view_teacher(store: FeatureStore, slug: str, row: int, others: Ints, searched: Ints, k: int) -> TeacherView:
    valid, towers = store.valid(slug), store.card(slug).towers
    bits, shard = int(valid[row]), row // store.record.rows_per_shard
    sound = {tower: store.features(slug, tower)[row] for tower in towers if bits & SOUND_BIT[tower]}
    norms = {tower: float(np.linalg.norm(values.astype(np.float64))) for tower, values in sound.items()}
    cosine = caption_rank = image_rank = None
    pool = others[:0]
    if towers == TOWERS:
        image, text = store.image(slug), store.text(slug)
        own_image, own_text = unit(image[row : row + 1])[0], unit(text[row : row + 1])[0]
        pool = others[valid[others] == PAIR_SOUND]
        pool = pool[truly_sound(image[pool]) & truly_sound(text[pool])]
        pair = bits == PAIR_SOUND and bool(np.isfinite(own_image).all() and np.isfinite(own_text).all())
        cosine = float(own_image @ own_text) if pair else None
        caption_rank = _rank(unit(text[pool]) @ own_image, cosine)
        image_rank = _rank(unit(image[pool]) @ own_text, cosine)
    tower: Tower | None = next(iter(sound), None)
    near: tuple[Neighbor, ...] = ()
    if tower is not None and truly_sound(sound[tower][None])[0]:
        within = None if len(searched) < SEARCHED_ROWS else searched
        rows, cosines = nearest_rows(store, slug, tower, sound[tower], k + 1, within)
        found = zip(rows.tolist(), cosines.tolist(), sample_rows(store, rows).to_pylist(), strict=True)
        near = tuple(Neighbor(n, s["key"], value, s["caption"]) for n, value, s in found if n != row)[:k]
    return TeacherView(
        slug=slug,
        extracted=(shard, slug) in store.ledger or not store.record.asked_towers(shard, store.card(slug)),
        image_norm=norm if math.isfinite(norm := norms.get("image", math.nan)) else None,
        text_norm=norm if math.isfinite(norm := norms.get("text", math.nan)) else None,
        cosine=cosine,
        caption_rank=caption_rank,
        image_rank=image_rank,
        ranked_among=len(pool) + 1,
        neighbors=near,
        neighbors_by=tower,
    )


def _rank(others: Singles, own: float | None) -> int | None:
    # Half of 1e-6 forgives the rounding between one product and many: an equal caption is no better one.
    return None if own is None else 1 + int(np.count_nonzero(others > own + 5e-7))
