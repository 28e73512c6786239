"""Statistics as tables, the interface between statistics and renderers, and the table of label columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads

from mmkd.base.arrays import Ints
from mmkd.base.text import number, printable
from mmkd.store.reader import FeatureStore

Cell = str | int | float | None


@dataclass(frozen=True)
class StatisticTable:
    """Shown by `mmkd store stats` (terminal and JSON), in notebooks and on the report's page."""

    title: str
    header: tuple[str, ...]
    """The first column names the row."""
    rows: Sequence[tuple[Cell, ...]]
    """Text, counts, or floats that are shown with three decimals; None and NaN where there is no value."""

    def text_rows(self) -> list[tuple[str, ...]]:
        """Return cells as they are shown."""
        return [tuple(_text(cell) for cell in row) for row in self.rows]


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return printable(cell)
    return f"{cell:,}" if isinstance(cell, int) else number(cell)


def count_distinct(store: FeatureStore, column: str, where: pads.Expression) -> tuple[int, int]:
    """Return how many rows have a text in a column, and how many different ones. Texts are held as 64-bit hashes, eight
    bytes a row: of 10^8 different texts two are taken for one with a chance of 3 in 10,000."""
    texts = (table[column].drop_null().to_pylist() for table in store.sample_tables([column], where))
    hashes = np.concatenate([np.fromiter(map(hash, some), np.int64, len(some)) for some in texts])
    hashes.sort()
    return len(hashes), int(np.count_nonzero(hashes[1:] != hashes[:-1])) + bool(len(hashes))


def label_table(store: FeatureStore, slugs: tuple[str, ...], rows: Ints) -> StatisticTable:
    """Count values, nulls, empty texts and distinct values of each label column of the whole store."""
    inputs = (pads.field("status") != "absent") & pads.field("image_rows").is_null()
    found = []
    for label in store.record.labels:
        every = empty = 0
        for table in store.sample_tables([label], inputs):
            every += len(table)
            empty += int(pc.sum(pc.equal(pc.utf8_trim_whitespace(table[label]), "")).as_py() or 0)
        values, distinct = count_distinct(store, label, inputs)
        found.append((label, values, every - values, empty, distinct))
    return StatisticTable("labels of the whole store", ("label", "rows", "null", "empty", "values"), found)
