"""Each model's values over all columns: a box, every point, and the paired test across columns."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from mmkd.evaluate.compare import compare
from mmkd.evaluate.figures.style import BLUE, COLUMN, GREY, asked, canvas, columns_with_values
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.statistics import p_text
from mmkd.evaluate.table import build_table


def box(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Quartiles and points of every model over columns, with Wilcoxon's p against `model`, adjusted after Holm.

    Raises:
        ConfigError: no such task, metric, head, share of labels or model, or no other model.
    """
    table = build_table(folder, question)
    columns = columns_with_values(table)
    scale = 100 if table.percent else 1
    p = {one.rival: one.wilcoxon_p_holm for one in compare(folder, model, question).rivals}
    figure, axes = canvas(2.0 + COLUMN * len(table.rows), 4.0)
    for x, row in enumerate(table.rows):
        values = np.array([table.value(row, column) * scale for column in columns])
        values = values[~np.isnan(values)]
        if len(values):
            colour = BLUE if row == model else GREY
            axes.boxplot(
                values, positions=[x], widths=0.5, showfliers=False, medianprops={"color": colour, "linewidth": 2}
            )
            # Points stand side by side in the order of columns, so that a column can be followed across models.
            spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(x + spread, values, "o", color=colour, markersize=3, alpha=0.8)
    names = [row if math.isnan(p.get(row, math.nan)) else f"{row}\np={p_text(p[row])}" for row in table.rows]
    axes.set_xticks(range(len(table.rows)), names, fontsize=8, rotation=30 if len(names) > 6 else 0)
    axes.set_ylabel(f"{table.metric}{' (%)' if table.percent else ''}", fontsize=8)
    title = f"{asked(question, table.metric)} over {len(columns)} columns\np: Wilcoxon against {model}, Holm"
    axes.set_title(title, fontsize=9, loc="left")
    return figure
