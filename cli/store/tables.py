"""Tables of plain text, columns lined up: numbers to the right, words to the left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> Iterator[str]:
    """A header and rows of equal length as lines; the first column is words, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield indent + "  ".join(cells).rstrip()


def number(value: float, digits: int = 3) -> str:
    """A number with a fixed count of decimals; `-` where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def percent(value: float) -> str:
    """A share with one decimal; `-` where there is none."""
    return f"{value:.1%}" if math.isfinite(value) else "-"
