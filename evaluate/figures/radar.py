"""Scores by domain or modality on spokes: what readers of CLIP papers expect, never the only picture."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from mmkd.evaluate.figures.style import COLOURS, MARKERS, asked, columns_with_values
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.table import build_table
from mmkd.store.errors import ConfigError

FEWEST, MOST = 3, 10
"""With fewer spokes there is no shape, with more nobody can read it."""


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
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes), "the projection that was asked for"
    for i, row in enumerate(sorted(table.rows, key=lambda row: row == model)):
        values = np.array([table.value(row, column) * scale for column in columns])
        place = table.rows.index(row)
        axes.plot(
            np.append(angles, angles[0]),
            np.append(values, values[0]),
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linewidth=2.5 if row == model else 1,
            markersize=4,
            label=row,
            zorder=2 + i,
        )
    counts = [max(table.cell(row, column).n for row in table.rows) for column in columns]
    axes.set_xticks(angles, [f"{column}\nn={n}" for column, n in zip(columns, counts, strict=True)], fontsize=8)
    for text, angle in zip(axes.get_xticklabels(), angles, strict=True):
        # Names stand outside the circle, where no line runs over them.
        sideways = np.cos(angle)
        text.set_horizontalalignment("center" if abs(sideways) < 0.1 else "left" if sideways > 0 else "right")
    axes.set_rlabel_position(180 / len(columns))
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{asked(question, table.metric)}{', percent' if table.percent else ''}; common scale from 0", fontsize=9
    )
    figure.legend(fontsize=8, loc="outside right center")
    return figure
