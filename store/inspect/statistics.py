"""Everything that `mmkd store stats` shows: each tower, each teacher's pairs, teachers against each other."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.dataset as pads

from mmkd.base.arrays import Ints
from mmkd.base.text import plain_values
from mmkd.store.inspect.agreement import Agreement, agreement
from mmkd.store.inspect.pairs import PairStatistics, modalities, pair_statistics
from mmkd.store.inspect.sampling import draw_inputs, draw_rows
from mmkd.store.inspect.table import StatisticTable, count_texts, label_table
from mmkd.store.inspect.towers import TowerStatistics, tower_statistics
from mmkd.store.layout import TOWERS
from mmkd.store.reader import FeatureStore

STATISTICS: dict[str, Callable[[FeatureStore, tuple[str, ...], Ints], StatisticTable]] = {
    "labels": label_table,
}
"""Further statistics by name: functions of the store, the teachers and the sampled rows, int64 (n,) ascending."""
SAMPLE_ROWS = 8192
"""Default sample: a share of 1 % is then known to within 0.2 points (two standard errors)."""
AGREEMENT_ROWS = 2048
"""Rows of the sample, at most, on which teachers are compared: every row is held against every other."""


@dataclass(frozen=True)
class StoreStatistics:
    """Statistics of a store's features from a sample of stated size and seed."""

    root: str
    rows: int
    """Rows of the store that have an input: absent rows between two corpora do not count."""
    sampled: int
    seed: int
    agreement_rows: int
    towers: tuple[TowerStatistics, ...]
    pairs: tuple[PairStatistics, ...]
    agreement: tuple[Agreement, ...]
    repeated_images: int
    """Rows of the whole store whose image file has the bytes of an earlier row's (by `image_sha256`)."""
    known_images: int
    """Rows of the whole store with an `image_sha256`; imported features have none."""
    repeated_captions: int
    left_out: str
    """Views and further captions: no statistic is of them."""
    tables: dict[str, StatisticTable]
    """Those of `STATISTICS`, by name; tables without rows are left out."""

    @property
    def drawn(self) -> str:
        """Description of the rows."""
        some = f"{self.sampled:,} of {self.rows:,} rows, seed {self.seed}"
        left_out = f"; left out: {self.left_out}" if self.left_out else ""
        return ("every row" if self.sampled == self.rows else some) + left_out

    @property
    def repeated(self) -> str:
        """Count of repeats."""
        return f"whole store: {self.repeated_images:,} repeated images, {self.repeated_captions:,} repeated captions"

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values: NaN becomes None, matrices lists of lists."""
        return dict(plain_values(asdict(self)))


def store_statistics(
    store: FeatureStore,
    teachers: Sequence[str] | None = None,
    sample: int | None = SAMPLE_ROWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StoreStatistics:
    """Compute statistics of these teachers, or of all, over `sample` rows drawn by `seed`; None streams every row.
    `progress` takes teachers done, and all of them. Raises UserError for an unknown teacher or an empty sample;
    CorruptStoreError if a chunk or sample part is missing or damaged."""
    slugs = tuple(store.teachers) if teachers is None else tuple(dict.fromkeys(teachers))
    for slug in slugs:
        store.card(slug)
    rows = draw_inputs(store, sample, seed)
    compared = draw_rows(rows, AGREEMENT_ROWS, seed)
    grouped = modalities(table["modality"] for table in store.sample_tables(["modality"]))
    towers: list[TowerStatistics] = []
    pairs: list[PairStatistics] = []
    for done, slug in enumerate(slugs):
        card = store.card(slug)
        towers += [tower_statistics(store, slug, tower, rows) for tower in card.towers]
        if card.towers == TOWERS:
            pairs.append(pair_statistics(store, slug, rows, seed, grouped))
        if progress:
            progress(done + 1, len(slugs))
    inputs = pads.field("image_rows").is_null()
    images, captions = (count_texts(store, name, inputs) for name in ("image_sha256", "caption"))
    return StoreStatistics(
        root=str(store.root),
        rows=sum(len(span.rows) for span in store.record.input_spans),
        sampled=len(rows),
        seed=seed,
        agreement_rows=len(compared),
        towers=tuple(towers),
        pairs=tuple(pairs),
        agreement=tuple(agreement(store, store.having(slugs, tower), tower, compared) for tower in TOWERS),
        repeated_images=images.there - images.different,
        known_images=images.there,
        repeated_captions=captions.there - captions.different,
        left_out=store.record.linked,
        tables={name: found for name, measure in STATISTICS.items() if (found := measure(store, slugs, rows)).rows},
    )
