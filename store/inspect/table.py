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


@dataclass(frozen=True)
class TextCounts:
    """Of the entries of a text column: how many rows, with a text, with a blank one, and how many different texts."""

    rows: int
    there: int
    blank: int
    different: int


def count_texts(store: FeatureStore, column: str, where: pads.Expression) -> TextCounts:
    """Count the texts of a sample column. They are held as 64-bit hashes, eight bytes a row: of 10^8 different ones two
    are taken for one with a chance of 3 in 10,000."""
    rows = blank = 0
    parts = []
    for table in store.sample_tables([column], where):
        texts = table[column].drop_null()
        rows += len(table)
        blank += int(pc.sum(pc.equal(pc.utf8_trim_whitespace(texts), "")).as_py() or 0)
        parts.append(np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts)))
    hashes = np.concatenate(parts)
    hashes.sort()
    different = int(np.count_nonzero(hashes[1:] != hashes[:-1])) + bool(len(hashes))
    return TextCounts(rows, len(hashes), blank, different)


def label_table(store: FeatureStore, slugs: tuple[str, ...], rows: Ints) -> StatisticTable:
    """Count values, nulls, empty texts and distinct values of each label column of the whole store."""
    inputs = (pads.field("status") != "absent") & pads.field("image_rows").is_null()
    counts = {label: count_texts(store, label, inputs) for label in store.record.labels}
    found = [(label, one.there, one.rows - one.there, one.blank, one.different) for label, one in counts.items()]
    return StatisticTable("labels of the whole store", ("label", "rows", "null", "empty", "values"), found)
