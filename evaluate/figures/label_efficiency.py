"""How scores grow with the share of labels, model by model."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from mmkd.base.errors import ConfigError
from mmkd.base.text import one_line
from mmkd.evaluate.figures.style import asked, canvas, line_style
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.table import build_table


def label_efficiency(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Mean over columns at each share of the labels, with intervals, on a logarithmic axis of shares.

    Raises:
        ConfigError: the task was run at one share only, or there is no such task, metric or head.
    """
    shares = sorted({unit.fraction for unit in folder.plan.units if unit.task == question.task})
    if len(shares) < 2:
        raise ConfigError(
            f"{question.task} was run at {len(shares)} share of the labels; a curve needs two or more: set fractions"
        )
    tables = [build_table(folder, replace(question, fraction=share)) for share in shares]
    last = tables[0].columns[-1]
    if not any(table.best(last) for table in tables):
        raise ConfigError(f"{tables[0].title}: no model has a value of {last} yet; `mmkd evaluate run` gets them")
    scale = 100 if tables[0].percent else 1
    figure, axes = canvas(7, 4.2)
    for i, row in enumerate(tables[0].rows):
        cells = [table.cell(row, last) for table in tables]
        values = [cell.value * scale for cell in cells]
        errors = [
            [value - cell.low * scale for value, cell in zip(values, cells, strict=True)],
            [cell.high * scale - value for value, cell in zip(values, cells, strict=True)],
        ]
        # Moved apart a little, so that intervals of two models do not hide each other.
        places = [share * 1.03 ** (i - len(tables[0].rows) / 2) for share in shares]
        axes.errorbar(
            places, values, yerr=errors, **line_style(i),
            linewidth=2.5 if row == model else 1, markersize=4, capsize=2, label=row,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("share of the labels")
    axes.set_ylabel(f"{tables[0].metric}{' (%)' if tables[0].percent else ''}", fontsize=8)
    axes.set_title(f"{asked(question, tables[0].metric)}, {one_line(last)}", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
