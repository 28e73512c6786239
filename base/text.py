"""Values as people or JSON read them: counts, bytes, seconds, shares, plain tables, printable text."""

import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

_WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)\.\d*")


def cell_text(value: object) -> str | None:
    """Return the text of a table's cell as it is compared: the one rule for filters, labels, groups and answers. White
    space at the ends does not count, and what is then empty is null. A decimal number loses the zeros at its end (`12`,
    `12.0` and `12.` are one); zeros at its beginning stay, because `012` is a name. Case counts."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = str(value).strip()
    if _WHOLE.fullmatch(text):
        text = text.rstrip("0").rstrip(".")
        text = "0" if text in ("-0", "+0") else text
    return text or None


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,024 rows`, `0 entries`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("ry") else f"{count:,} {noun}s"


def bytes_text(count: int) -> str:
    """`count` bytes in the largest binary unit that keeps it above one: `1.5 GB`."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"


def seconds_text(seconds: float) -> str:
    """Return a time span in one or two units: `12.3 s`, `4 min 10 s`, `5 h 2 min`, `3 d 1 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def number(value: float, digits: int = 3) -> str:
    """A number with a fixed count of decimals; `-` where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def percent(value: float) -> str:
    """Return a share with one decimal; `-` where there is none."""
    return f"{value:.1%}" if math.isfinite(value) else "-"


def plain_values(value: Any) -> Any:
    """Return arrays and tuples as lists, NumPy's numbers as Python's, keys as strings, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain_values(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> Iterator[str]:
    """Yield a header and rows of equal length as indented lines. `words`: names of left-aligned columns, by
    default the first one."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = [name in (words or header[:1]) for name in header]
    for row in (header, *rows):
        cells = zip(row, widths, left, strict=True)
        yield "  " + "  ".join(c.ljust(width) if is_word else c.rjust(width) for c, width, is_word in cells).rstrip()


def html_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column names the row; every text is escaped."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    caption = f"<caption>{escape(caption)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def printable(text: str) -> str:
    """`text` without control characters: a caption cannot move the cursor, change colors or answer for the user."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


_NOT_ON_A_LINE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
_ESCAPED = re.compile(rf"[{_NOT_ON_A_LINE}]|\\(?=[tnrxu\\{_NOT_ON_A_LINE}])")


def one_line(text: str) -> str:
    """`text` with line breaks, control characters, marks of direction and noncharacters as escapes: `\\n`, `\\u2028`.

    Different texts stay different: a backslash that would look like the beginning of an escape is doubled.
    """
    return _ESCAPED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
