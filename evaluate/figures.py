"""Figures of an output folder, with numbers of samples and intervals where there are any, in color-blind-safe colors.
All raise ConfigError if there is no such task, metric, head, share of labels or model, or nothing to draw."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from numpy.typing import NDArray
from scipy.stats import CensoredData, ecdf, logrank

from mmkd.base.errors import ConfigError
from mmkd.base.files import write_atomically
from mmkd.base.text import one_line
from mmkd.evaluate.compare import compare
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.statistics import TOLERANCE, VERDICTS, Difference, Verdict, dense_ranks, p_text
from mmkd.evaluate.table import ResultTable, build_table

BLUE, VERMILLION, GRAY = "#0072B2", "#D55E00", "#6b6b6b"
"""Source: Okabe and Ito 2008, "Color universal design": distinguishable with every kind of color blindness."""
COLORS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":")
PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False}
"""Text is not mathematics: a `$` in a name is a dollar."""
FORMATS = ("pdf", "png", "svg")
ROW, COLUMN, LETTER = 0.34, 0.95, 0.075
"""Inches that a row of a chart, a column and a letter need."""
WRAP = 16
"""Letters of a name in a line of a narrow column."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix gives the format. Equal numbers give equal bytes: no dates, no random names. Raises
    ConfigError for a suffix other than .svg, .png or .pdf. Raises StoreError if the disk is full or read-only."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path.name} is no kind of picture; end it with {', '.join('.' + one for one in FORMATS)}")
    write_atomically(path, rendered(figure, kind))


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the bytes of a figure in one of `FORMATS`; one warning where the font lacks letters, which an SVG does
    not need."""
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
    figure, axes = _canvas(width, 1.3 + ROW * len(table.rows) + 0.15 * lines)
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
    figure, axes = _canvas(max(7.0, 4.0 + longest), 1.6 + ROW * len(lines))
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
    figure, axes = _canvas(width, 4.0)
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
    last = tables[0].columns[-1]
    if not any(table.best(last) for table in tables):
        raise ConfigError(f"{tables[0].title}: no model has a value of {last} yet; `mmkd evaluate run` gets them")
    scale = tables[0].scale
    figure, axes = _canvas(7, 4.2)
    for i, row in enumerate(tables[0].rows):
        cells = [table.cell(row, last) for table in tables]
        # Moved apart a little, so that intervals of two models do not hide each other.
        places = [share * 1.03 ** (i - len(tables[0].rows) / 2) for share in shares]
        style = line_style(i) | {"linewidth": 2.5 if row == model else 1, "markersize": 4}
        axes.plot(places, [cell.value * scale for cell in cells], **style, label=row)
        # Lines of their own: a percentile interval need not hold the value, which error bars must.
        limits = np.array([(cell.low, cell.high) for cell in cells]).T * scale
        axes.vlines(places, *limits, color=style["color"], linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("share of the labels")
    axes.set_ylabel(f"{tables[0].metric}{' (%)' if tables[0].percent else ''}", fontsize=8)
    axes.set_title(f"{_asked(question, tables[0].metric)}, {short_names([last])[0]}", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def kaplan_meier(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Curves of both halves by risk (see `high_risk`) with 95 % bands and the log-rank test, one panel per data set;
    the first draw of the folds."""
    if question.task != "survival":
        raise ConfigError(f"Kaplan-Meier curves are of task survival, not {question.task!r}; give --task survival")
    panels = []
    for spec in folder.datasets(question):
        draws = folder.answers(question, spec.dataset, model)
        if isinstance(draws, str):
            raise ConfigError(f"{model} has no survival predictions on {spec.dataset}: {draws}")
        panels.append((spec.dataset, draws[0].take(draws[0].available)))
        if not high_risk(panels[-1][1]).any():
            raise ConfigError(f"{model} gives all patients of {spec.dataset} one risk: there are no halves to draw")
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (dataset, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _survival_panel(axes, f"{dataset}: {model}", found)
    return figure


def high_risk(found: Predictions) -> NDArray[np.bool_]:
    """Patients above the median risk of their fold, bool (n,); risks of two folds are not on one scale."""
    risk = found.column("risk")
    fold = np.zeros(len(found), dtype=np.int64) if found.fold is None else found.fold
    high = np.zeros(len(found), dtype=bool)
    for number in np.unique(fold):
        mask = fold == number
        high[mask] = risk[mask] - np.median(risk[mask]) > TOLERANCE
    return high


def band(group: CensoredData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return pointwise 95 % limits of a curve at each of its times, by Greenwood's variance on the log-log scale.
    Kalbfleisch and Prentice 2002, section 1.4. NaN where the curve is at one or at zero: there they do not exist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy takes the logarithm of zero for those points
        limits = ecdf(group).sf.confidence_interval(0.95, method="log-log")
    return limits.low.probabilities, limits.high.probabilities


def _survival_panel(axes: Axes, title: str, found: Predictions) -> None:
    high = high_risk(found)
    groups = []
    for mask, name, color, style in ((high, "high risk", VERMILLION, "-"), (~high, "low risk", BLUE, "--")):
        time, event = found.column("time")[mask], found.column("event")[mask] > 0
        groups.append(CensoredData(uncensored=time[event], right=time[~event]))
        survival = ecdf(groups[-1]).sf
        label = f"{name} (n={mask.sum()}, {event.sum()} events)"
        axes.step(
            np.concatenate([[0.0], survival.quantiles]), np.concatenate([[1.0], survival.probabilities]),
            where="post", color=color, linestyle=style, label=label,
        )  # fmt: skip
        limits = band(groups[-1])
        for limit in limits:
            if len(limit) > 1 and np.isnan(limit[-1]):  # at zero, the previous limit holds
                limit[-1] = limit[-2]
        axes.fill_between(survival.quantiles, *limits, step="post", color=color, alpha=0.15, linewidth=0)
        censored = np.sort(time[~event])
        axes.plot(censored, survival.evaluate(censored), "|", color=color, markersize=5)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("time (unit of the table)", fontsize=8)
    axes.set_ylabel("share alive", fontsize=8)
    axes.set_title(fill(f"{title}; log-rank p={p_text(logrank(*groups).pvalue)}", 60), fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="upper right", title="with 95% bands", title_fontsize=8)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


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
    for draw in (heat_map, forest, box, radar, label_efficiency, kaplan_meier)
}
"""Name to the function that draws it from (results, question, the model that is compared with the others)."""
