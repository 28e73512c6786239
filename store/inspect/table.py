"""A statistic as a table, the interface between statistics and renderers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmkd.base.text import number, printable

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
