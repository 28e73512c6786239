"""What figures share: colours that all eyes tell apart, sizes, and files that are equal when the numbers are."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmkd.base.errors import ConfigError
from mmkd.base.files import write_atomically
from mmkd.evaluate.folder import Question
from mmkd.evaluate.table import ResultTable

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#6b6b6b"
"""From Okabe and Ito 2008, "Color universal design": told apart with every kind of colour blindness."""
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":")
DIVERGING = "PuOr_r"
"""Purple below, orange above: no red against green. ColorBrewer lists it as safe for colour-blind readers."""
PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False}
"""Texts are no mathematics: a `$` in a name is a dollar."""
FORMATS = ("pdf", "png", "svg")
ROW, COLUMN = 0.34, 0.95
"""Inches that a row and a column of a chart need for their text."""


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes, without a window. Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix says how. Equal numbers give equal bytes: no dates, no random names.

    Raises:
        ConfigError: a suffix other than .svg, .png or .pdf.
        StoreError: the disk is full or read-only.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path.name} is no kind of picture; end it with {', '.join('.' + one for one in FORMATS)}")
    write_atomically(path, rendered(figure, kind))


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a file of this kind."""
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    buffer = io.BytesIO()
    look: dict[Any, Any] = {"svg.hashsalt": "mmkd", "svg.fonttype": "none", "savefig.dpi": 150}
    with mpl.rc_context(PLAIN_TEXT | look), warnings.catch_warnings():
        if kind == "svg":  # its texts are drawn by the reader's fonts
            warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format=kind, metadata=dates[kind])
    return buffer.getvalue()


def line_style(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this number, from 0: 24 lines are all different."""
    lap, place = divmod(place, len(COLOURS))
    return {
        "color": COLOURS[place],
        "marker": MARKERS[(place + 3 * lap) % len(MARKERS)],
        "linestyle": DASHES[lap % len(DASHES)],
    }


def columns_with_values(table: ResultTable) -> list[str]:
    """The columns, the mean aside, where some model has a value.

    Raises:
        ConfigError: there is none to draw.
    """
    found = [one for one in table.groups if table.best(one)]
    if not found:
        raise ConfigError(f"{table.title}: no model has a value yet; `mmkd evaluate run` gets them")
    return found


def asked(question: Question, metric: str) -> str:
    """The question as a title."""
    parts = [question.task, question.head or "", metric]
    if question.fraction < 1:
        parts.append(f"{question.fraction:.0%} of labels")
    return " ".join(part for part in parts if part)
