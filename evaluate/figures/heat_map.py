"""Models by columns: the scores, coloured by their distance to the best rival, with a dot where that is no accident."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from mmkd.base.text import one_line
from mmkd.evaluate.compare import compare
from mmkd.evaluate.figures.style import COLUMN, DIVERGING, ROW, asked, canvas, columns_with_values
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.table import ResultTable, build_table


def heat_map(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Every score; colour is the difference to the best of the other models in its column.

    A dot marks a paired interval of that difference without zero. A cell without a value is empty and says so.

    Raises:
        ConfigError: no such task, metric, head, share of labels or model.
    """
    table = build_table(folder, question)
    columns_with_values(table)  # one without is shown empty, a picture of none is not drawn
    columns = table.groups
    best = {column: next(iter(table.best(column, besides=model)), None) for column in columns}
    marks = _marks(folder, question, table, best)
    scale = 100 if table.percent else 1
    delta = np.full((len(table.rows), len(columns)), np.nan)
    for i, row in enumerate(table.rows):
        for j, column in enumerate(columns):
            if best[column] is not None:
                delta[i, j] = (table.value(row, column) - table.value(str(best[column]), column)) * scale
    figure, axes = canvas(3.0 + COLUMN * len(columns), 1.3 + ROW * len(table.rows))
    # Below the digit that is shown there is nothing to colour.
    reach = max(0.1, float(np.nanmax(np.abs(delta), initial=0.0)))
    painted = -delta if table.lower_is_better else delta
    image = axes.imshow(painted, cmap=DIVERGING, norm=TwoSlopeNorm(0, -reach, reach), aspect="auto")
    for i, row in enumerate(table.rows):
        for j, column in enumerate(columns):
            value = table.value(row, column)
            text = "n/a" if math.isnan(value) else f"{value * scale:.1f}{' ●' if (row, column) in marks else ''}"
            dark = not math.isnan(painted[i, j]) and abs(painted[i, j]) > 0.6 * reach
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    counts = [max(table.cell(row, column).n for row in table.rows) for column in columns]
    labels = [f"{one_line(column)}\nn={n}" for column, n in zip(columns, counts, strict=True)]
    axes.set_xticks(range(len(columns)), labels, fontsize=8, rotation=30 if len(columns) > 5 else 0)
    axes.set_yticks(range(len(table.rows)), [f"{row} ◂" if row == model else row for row in table.rows], fontsize=8)
    title = f"{asked(question, table.metric)}\n● paired interval of the difference without zero"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)  # over all of the width: one column is narrower than it
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(f"to the best\nbut {model}", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _marks(
    folder: ResultFolder, question: Question, table: ResultTable, best: dict[str, str | None]
) -> set[tuple[str, str]]:
    """Cells whose paired interval against the best rival of the column does not hold zero."""
    found = set()
    for rival in dict.fromkeys(name for name in best.values() if name is not None):
        others = tuple(row for row in table.rows if row != rival)
        for one in compare(folder, rival, question, others).rivals if others else ():
            for column, verdict in one.verdicts.items():
                if best.get(column) == rival and verdict != "tie":
                    found.add((one.rival, column))
    return found
