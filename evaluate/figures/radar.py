"""Scores by domain or modality on spokes: what readers of CLIP papers expect, never the only picture."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from mmkd.base.errors import ConfigError
from mmkd.base.text import one_line
from mmkd.evaluate.figures.style import asked, columns_with_values, line_style
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.table import build_table

FEWEST, MOST = 3, 10
"""With fewer spokes there is no shape, with more nobody can read it."""

_CIRCLE, _NAMES, _LETTER = 4.6, 1.3, 0.075
"""Inches: the circle, the room for names on either side of it, a letter of the legend."""
_WRAP = 16
"""Letters of a name before it goes on in the next line."""


def radar(folder: ResultFolder, question: Question, model: str) -> Figure:
    """All models on one common scale from zero; `model` in front.

    Raises:
        ConfigError: fewer than 3 or more than 10 columns with values, or no such task, metric, head or share of labels.
    """
    table = build_table(folder, question)
    columns = columns_with_values(table)
    if not FEWEST <= len(columns) <= MOST:
        raise ConfigError(
            f"a radar needs {FEWEST} to {MOST} columns, {question.by} gives {len(columns)}; try --by modality, or box"
        )
    scale = 100 if table.percent else 1
    angles = np.linspace(0, 2 * np.pi, len(columns), endpoint=False)
    # Placed by hand: the layout that makes room for texts does not see those around a circle.
    width = _CIRCLE + 2 * _NAMES + 0.6 + _LETTER * max(map(len, table.rows))
    figure = Figure(figsize=(width, _CIRCLE + 1.6))
    height = figure.get_figheight()
    axes = figure.add_axes((_NAMES / width, 0.6 / height, _CIRCLE / width, _CIRCLE / height), projection="polar")
    assert isinstance(axes, PolarAxes), "the projection that was asked for"
    for i, row in enumerate(sorted(table.rows, key=lambda row: row == model)):
        values = np.array([table.value(row, column) * scale for column in columns])
        axes.plot(
            np.append(angles, angles[0]),
            np.append(values, values[0]),
            **line_style(table.rows.index(row)) | ({"linestyle": "-"} if row == model else {}),
            linewidth=2.5 if row == model else 1,
            markersize=4,
            label=row,
            zorder=2 + i,
        )
    counts = [max(table.cell(row, column).n for row in table.rows) for column in columns]
    axes.set_ylim(0, top := max(np.asarray(line.get_ydata()).max() for line in axes.lines) * 1.04)
    axes.set_xticks(angles, [""] * len(columns))
    for column, n, angle in zip(columns, counts, angles, strict=True):
        # Names stand outside the circle, where no line runs over them.
        across, up = np.cos(angle), np.sin(angle)
        axes.text(
            angle, top * 1.05, f"{fill(one_line(column), _WRAP)}\nn={n}", fontsize=8,
            horizontalalignment="center" if abs(across) < 0.1 else "left" if across > 0 else "right",
            verticalalignment="center" if abs(up) < 0.1 else "bottom" if up > 0 else "top",
        )  # fmt: skip
    axes.set_rlabel_position(180 / len(columns))
    title = f"{asked(question, table.metric)}{', percent' if table.percent else ''}; common scale from 0"
    figure.text(_NAMES / width, 1 - 0.1 / height, title, fontsize=9, verticalalignment="top")
    figure.legend(fontsize=8, loc="center left", bbox_to_anchor=((_CIRCLE + 2 * _NAMES) / width, 0.5))
    return figure
