"""Figures of an output folder, with numbers of samples and intervals where there are any, in color-blind-safe colors.
All raise ConfigError if there is no such task, metric, head, share of labels or model, or nothing to draw."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from textwrap import fill
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from mmkd.base.errors import ConfigError
from mmkd.evaluate.compare import compare
from mmkd.evaluate.curves import decision_curve, kaplan_meier, reliability
from mmkd.evaluate.drawing import BLUE, GRAY, PLAIN_TEXT, VERMILLION, canvas, line_style, short_names
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.statistics import VERDICTS, Difference, Verdict, dense_ranks, p_text
from mmkd.evaluate.table import ResultTable, build_table

ROW, COLUMN, LETTER = 0.34, 0.95, 0.075
"""Inches that a row of a chart, a column and a letter need."""
WRAP = 16
"""Letters of a name in a line of a narrow column."""


def heat_map(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Every score; color is the paired difference to the best of the other models in its column, a dot an interval of
    that difference without zero. A cell that cannot be compared has no color."""
    table = build_table(folder, question)
    _columns_with_values(table)  # a single one without a value is shown empty
    columns = table.groups
    best = {column: next(iter(table.best(column, besides=model)), None) for column in columns}
    delta = np.full((len(table.rows), len(columns)), np.nan)
    marks = np.zeros(delta.shape, dtype=bool)
    for rival in {name for name in best.values() if name is not None}:
        others = tuple(row for row in table.rows if row != rival)
        comparison = compare(folder, rival, question, others) if others else None
        for j in (j for j, column in enumerate(columns) if best[column] == rival):
            delta[table.rows.index(rival), j] = 0.0
            for one in comparison.rivals if comparison is not None else ():
                found, i = one.differences[columns[j]], table.rows.index(one.rival)
                if isinstance(found, Difference):
                    delta[i, j] = -found.value * table.scale
                    marks[i, j] = one.verdicts.get(columns[j], "tie") != "tie"
    names = [fill(name, WRAP) for name in short_names(columns)]
    width = 2.2 + max(1.0, LETTER * min(2 * WRAP, max(map(len, table.rows)))) + COLUMN * max(len(columns), 2)
    lines = max(name.count("\n") for name in names)
    figure, axes = canvas(width, 1.3 + ROW * len(table.rows) + 0.15 * lines)
    # Below the digit that is shown there is nothing to color.
    reach = max(0.1, float(np.nanmax(np.abs(delta), initial=0.0)))
    painted = -delta if table.lower_is_better else delta
    # Purple below, orange above, which ColorBrewer lists as safe for color-blind readers.
    image = axes.imshow(painted, cmap="PuOr_r", norm=TwoSlopeNorm(0, -reach, reach), aspect="auto")
    for i, row in enumerate(table.rows):
        for j, column in enumerate(columns):
            value = table.value(row, column)
            text = "n/a" if math.isnan(value) else f"{value * table.scale:.1f}{' ●' if marks[i, j] else ''}"
            dark = not math.isnan(painted[i, j]) and abs(painted[i, j]) > 0.6 * reach
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ticks = [f"{name}\nn={table.count(column)}" for name, column in zip(names, columns, strict=True)]
    axes.set_xticks(range(len(columns)), ticks, fontsize=8, rotation=30 if len(columns) > 5 else 0)
    rows = [fill(f"{row} ◂" if row == model else row, 2 * WRAP) for row in table.rows]
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    title = f"{_asked(question, table.metric)}\n● paired interval of the difference without zero"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)  # over all of the width: one column is narrower than it
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(f"to the best\nbut {fill(model, 24)}", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def forest(folder: ResultFolder, question: Question, model: str) -> Figure:
    """The difference to the best other model of each column, sorted, with paired intervals and the count of wins. The
    best rival is chosen on the same samples, which favors it: the comparison is strict on `model`."""
    table = build_table(folder, question)
    comparison = compare(folder, model, question)
    lines: list[tuple[str, Difference, Verdict | None]] = []
    for column, name in zip(table.groups, short_names(table.groups), strict=True):
        rival = next(iter(table.best(column, besides=model)), None)
        for against in comparison.rivals:
            found = against.differences.get(column)
            if against.rival == rival and isinstance(found, Difference) and not math.isnan(found.value):
                between = "\n" if len(name) + len(rival) > 3 * WRAP else " "
                label = f"{name} (n={found.n}){between}against {rival}"
                lines.append((label, found, against.verdicts.get(column)))
    if not lines:
        raise ConfigError(f"{table.title}: {model} and another model have no column in common to compare on")
    rank = dense_ranks(np.array([one.value for _, one, _ in lines]))
    lines = [lines[i] for i in np.argsort(rank, kind="stable")]
    longest = LETTER * max(len(line) for label, _, _ in lines for line in label.split("\n"))
    figure, axes = canvas(max(7.0, 4.0 + longest), 1.6 + ROW * len(lines))
    looks = {"win": (BLUE, "o"), "loss": (VERMILLION, "s"), "tie": (GRAY, "D"), None: (GRAY, "x")}
    for y, (_, one, verdict) in enumerate(lines):
        color, marker = looks[verdict]
        low, high = (one.value if math.isnan(bound) else bound for bound in (one.low, one.high))
        axes.plot([low * table.scale, high * table.scale], [y, y], color=color, linewidth=1.5)
        axes.plot(one.value * table.scale, y, marker=marker, color=color, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=8)
    count = Counter(verdict for _, _, verdict in lines)
    totals = ", ".join(f"{count[kind]} {kind}" for kind in VERDICTS)
    totals += f", {count[None]} without interval" if count[None] else ""
    head = fill(f"{model} minus the best other:", 3 * WRAP)
    axes.set_title(f"{head}{chr(10) if len(head) > 3 * WRAP else ' '}{totals}", fontsize=10, loc="left")
    unit = ", percentage points" if comparison.percent else ""
    # Under all of the picture: names at the left may leave the axes narrower than this.
    figure.supxlabel(f"{_asked(question, table.metric)}{unit}; {comparison.level:.0%} paired intervals", fontsize=8)
    axes.set_ylim(-0.7, len(lines) - 0.3)
    return figure


def box(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Quartiles and points of every model over columns, with Wilcoxon's p against `model`, adjusted after Holm."""
    table = build_table(folder, question)
    columns = _columns_with_values(table)
    p = {one.rival: one.wilcoxon_p_holm for one in compare(folder, model, question).rivals}
    against = fill(f"p: Wilcoxon against {model}, Holm", 3 * WRAP)
    title = f"{_asked(question, table.metric)} over {len(columns)} columns\n{against}"
    width = max(2.0 + COLUMN * len(table.rows), 1.0 + LETTER * max(map(len, title.split("\n"))))
    figure, axes = canvas(width, 4.0)
    for x, row in enumerate(table.rows):
        values = np.array([table.value(row, column) * table.scale for column in columns])
        values = values[~np.isnan(values)]
        if len(values):
            color = BLUE if row == model else GRAY
            line = {"color": color, "linewidth": 2}
            axes.boxplot(values, positions=[x], widths=0.5, showfliers=False, medianprops=line)
            # Points stand side by side in the order of columns, so that a column can be followed across models.
            spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(x + spread, values, "o", color=color, markersize=3, alpha=0.8)
    tests = {row: "" if math.isnan(p.get(row, math.nan)) else f"\np={p_text(p[row])}" for row in table.rows}
    filled = {row: sum(not math.isnan(table.value(row, column)) for column in columns) for row in table.rows}
    some = {
        row: f"\n{count} of {len(columns)} columns" if count < len(columns) else "" for row, count in filled.items()
    }
    names = [fill(row, WRAP) + some[row] + test for row, test in tests.items()]
    axes.set_xticks(range(len(table.rows)), names, fontsize=8, rotation=30 if len(names) > 6 else 0)
    axes.set_ylabel(f"{table.metric}{' (%)' if table.percent else ''}", fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    return figure


def radar(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Scores of all models in 3 to 10 columns on one scale from zero, `model` in front. Never the only figure."""
    table = build_table(folder, question)
    columns = _columns_with_values(table)
    if not 3 <= len(columns) <= 10:
        raise ConfigError(
            f"a radar needs 3 to 10 columns, {question.by} gives {len(columns)}; try --by modality, or box"
        )
    angles = np.linspace(0, 2 * np.pi, len(columns), endpoint=False)
    # Placed by hand, in inches: the layout that makes room for texts does not see those around a circle.
    circle, margin = 4.6, 1.3
    width = circle + 2 * margin + 0.6 + LETTER * max(map(len, table.rows))
    height = circle + 1.6
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((margin / width, 0.6 / height, circle / width, circle / height), projection="polar")
    assert isinstance(axes, PolarAxes), "the projection that was asked for"
    for i, row in enumerate(sorted(table.rows, key=lambda row: row == model)):
        values = np.array([table.value(row, column) * table.scale for column in columns])
        style = line_style(table.rows.index(row)) | ({"linestyle": "-"} if row == model else {})
        axes.plot(
            np.append(angles, angles[0]), np.append(values, values[0]), **style,
            linewidth=2.5 if row == model else 1, markersize=4, label=row, zorder=2 + i,
        )  # fmt: skip
    axes.set_ylim(0, top := np.nanmax([line.get_ydata() for line in axes.lines]) * 1.04)
    axes.set_xticks(angles, [""] * len(columns))
    for column, name, angle in zip(columns, short_names(columns), angles, strict=True):
        # Names are outside the circle, away from lines.
        across, up = np.cos(angle), np.sin(angle)
        axes.text(
            angle, top * 1.05, f"{fill(name, WRAP)}\nn={table.count(column)}", fontsize=8,
            horizontalalignment="center" if abs(across) < 0.1 else "left" if across > 0 else "right",
            verticalalignment="center" if abs(up) < 0.1 else "bottom" if up > 0 else "top",
        )  # fmt: skip
    axes.set_rlabel_position(180 / len(columns))
    title = f"{_asked(question, table.metric)}{', percent' if table.percent else ''}; common scale from 0"
    figure.text(margin / width, 1 - 0.1 / height, title, fontsize=9, verticalalignment="top")
    figure.legend(fontsize=8, loc="center left", bbox_to_anchor=((circle + 2 * margin) / width, 0.5))
    return figure


def label_efficiency(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Mean over columns at each share of the labels, with intervals, on a logarithmic axis."""
    shares = sorted({unit.fraction for unit in folder.plan.units if unit.task == question.task})
    if len(shares) < 2:
        raise ConfigError(
            f"{question.task} was run at {len(shares)} share of the labels; a curve needs two or more: set fractions"
        )
    tables = [build_table(folder, replace(question, fraction=share)) for share in shares]
    ticks = {share: f"{share:.0%}" for share in shares}
    return _learning_curves(tables, ticks, "share of the labels", question, model)


def shots(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Mean over columns at each number of shots, with intervals, on a logarithmic axis."""
    if question.task != "few_shot":
        raise ConfigError(f"shots are of task few_shot, not {question.task!r}; give --task few_shot")
    _, metric, _ = folder.asked(question)
    name = metric.partition("@")[0]
    counts = {int(one.partition("@")[2]): one for one in folder.metrics(question) if one.startswith(f"{name}@")}
    if not counts:
        raise ConfigError(f"{metric} is not of a number of shots; give --metric bacc@1, or another with an @")
    ticks: dict[float, str] = {count: str(count) for count in sorted(counts)}
    tables = [build_table(folder, replace(question, metric=counts[count])) for count in sorted(counts)]
    return _learning_curves(tables, ticks, "training samples of each class", replace(question, metric=name), model)


def _learning_curves(
    tables: list[ResultTable], ticks: Mapping[float, str], what: str, question: Question, model: str
) -> Figure:
    """A line for each model over one table for each tick of a logarithmic axis."""
    last = tables[0].columns[-1]
    if not any(table.best(last) for table in tables):
        raise ConfigError(f"{tables[0].title}: no model has a value of {last} yet; `mmkd evaluate run` gets them")
    scale = tables[0].scale
    figure, axes = canvas(7, 4.2)
    for i, row in enumerate(tables[0].rows):
        cells = [table.cell(row, last) for table in tables]
        # Moved apart a little, so that intervals of two models do not hide each other.
        places = [one * 1.03 ** (i - len(tables[0].rows) / 2) for one in ticks]
        style = line_style(i) | {"linewidth": 2.5 if row == model else 1, "markersize": 4}
        axes.plot(places, [cell.value * scale for cell in cells], **style, label=row)
        # Lines of their own: a percentile interval need not hold the value, which error bars must.
        limits = np.array([(cell.low, cell.high) for cell in cells]).T * scale
        axes.vlines(places, *limits, color=style["color"], linewidth=1)
    metric = question.metric or tables[0].metric
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_ylabel(f"{metric}{' (%)' if tables[0].percent else ''}", fontsize=8)
    axes.set_title(f"{_asked(question, metric)}, {short_names([last])[0]}", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(what)
    return figure


def _columns_with_values(table: ResultTable) -> list[str]:
    found = [one for one in table.groups if table.best(one)]
    if not found:
        raise ConfigError(f"{table.title}: no model has a value yet; `mmkd evaluate run` gets them")
    return found


def _asked(question: Question, metric: str) -> str:
    share = f"{question.fraction:.0%} of labels" if question.fraction < 1 else ""
    return " ".join(filter(None, [question.task, question.head, metric, share]))


FIGURES: Final[Mapping[str, Callable[[ResultFolder, Question, str], Figure]]] = {
    draw.__name__.replace("_", "-"): mpl.rc_context(PLAIN_TEXT)(draw)
    for draw in (heat_map, forest, box, radar, label_efficiency, shots, kaplan_meier, reliability, decision_curve)
}
"""Name to the function that draws it from (results, question, the model that is compared with the others)."""
