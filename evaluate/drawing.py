"""Drawing of figures: colors safe for color-blind readers, names that fit, and equal files for equal numbers."""

import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmkd.base.errors import ConfigError
from mmkd.base.files import write_atomically
from mmkd.base.text import one_line

BLUE, VERMILLION, GRAY = "#0072B2", "#D55E00", "#6b6b6b"
"""Source: Okabe and Ito 2008, "Color universal design": distinguishable with every kind of color blindness."""
COLORS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":")
PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False}
"""Text is not mathematics: a `$` in a name is a dollar."""
FORMATS = ("pdf", "png", "svg")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix gives the format. Equal numbers give equal bytes: no dates, no random names. Raises
    ConfigError for a suffix other than .svg, .png or .pdf. Raises StoreError if the disk is full or read-only."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path.name} is no kind of picture; end it with {', '.join('.' + one for one in FORMATS)}")
    write_atomically(path, rendered(figure, kind))


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the bytes of a figure in one of `FORMATS`; one warning where the font lacks letters (not of an SVG)."""
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    buffer = io.BytesIO()
    look: dict[Any, Any] = {"svg.hashsalt": "mmkd", "svg.fonttype": "none", "savefig.dpi": 150}
    with mpl.rc_context(PLAIN_TEXT | look), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, format=kind, metadata=dates[kind])
    others = [one for one in caught if "missing from font" not in str(one.message)]
    for one in others:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if kind != "svg" and len(others) < len(caught):
        warnings.warn(f"the font of .{kind} figures lacks letters of a name; .svg figures show them", stacklevel=2)
    return buffer.getvalue()


def short_names(names: Sequence[str], letters: int = 48) -> list[str]:
    """Return different labels of names: on one line, at most about `letters` long without their middle."""
    shown: list[str] = []
    for name in map(one_line, names):
        label = name if len(name) <= letters else f"{name[: letters * 2 // 3]}…{name[1 - letters // 3 :]}"
        candidates = itertools.chain([label], (f"{label} ({n})" for n in itertools.count(2)))
        shown.append(next(one for one in candidates if one not in shown))
    return shown


def line_style(place: int) -> dict[str, Any]:
    """Color, marker and dashes of the line with this number, from 0: 24 lines are all different."""
    lap, place = divmod(place, len(COLORS))
    marker = MARKERS[(place + 3 * lap) % len(MARKERS)]
    return {"color": COLORS[place], "marker": marker, "linestyle": DASHES[lap % len(DASHES)]}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()
