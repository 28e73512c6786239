"""Tables of plain text, columns lined up: numbers to the right, words to the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> Iterator[str]:
    """A header and rows of equal length as lines, indented.

    Args:
        header: names of the columns.
        rows: as many cells each.
        words: columns of words, to be lined up on the left; the first column only when not given.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = [name in (words or header[:1]) for name in header]
    for row in (header, *rows):
        cells = zip(row, widths, left, strict=True)
        yield "  " + "  ".join(c.ljust(width) if is_word else c.rjust(width) for c, width, is_word in cells).rstrip()


def printable(text: str) -> str:
    """`text` without control characters: a caption cannot move the cursor, change colours or answer for the user."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
