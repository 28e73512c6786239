"""Statistics as tables, the interface between statistics and renderers, and the table of label columns."""

from collections.abc import Sequence
from dataclasses import dataclass

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


def label_table(store: FeatureStore, slugs: tuple[str, ...], rows: Ints) -> StatisticTable:
    """Count values, nulls, empty texts and distinct values of each label column of the whole store."""
    inputs = (pads.field("status") != "absent") & pads.field("image_rows").is_null()
    table = store.sample_table([*store.record.labels], inputs)
    found = []
    for label in store.record.labels:
        column = table[label]
        empty = int(pc.sum(pc.equal(pc.utf8_trim_whitespace(column), "")).as_py() or 0)
        values = int(pc.count_distinct(column).as_py())
        found.append((label, len(column) - column.null_count, column.null_count, empty, values))
    return StatisticTable("labels of the whole store", ("label", "rows", "null", "empty", "values"), found)
