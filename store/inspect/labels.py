"""Label columns of the whole store: how many rows have a value, and how many different ones there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkd.store.inspect.table import StatisticTable

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore


def label_table(store: FeatureStore, slugs: tuple[str, ...], rows: NDArray[np.int64]) -> StatisticTable:
    """Return rows with a value, without one (null), with an empty text, and distinct values of each label column."""
    table = store.sample_table([*store.record.labels, "status"])
    table = table.filter(pc.not_equal(table["status"], "absent"))
    found = []
    for label in store.record.labels:
        column = table[label]
        empty = int(pc.sum(pc.equal(pc.utf8_trim_whitespace(column), "")).as_py() or 0)
        values = int(pc.count_distinct(column).as_py())
        found.append((label, len(column) - column.null_count, column.null_count, empty, values))
    return StatisticTable("labels of the whole store", ("label", "rows", "null", "empty", "values"), found)
