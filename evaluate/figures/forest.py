"""One model against the best other, column by column, with paired intervals: the honest picture."""

from __future__ import annotations

import math
from collections import Counter

from matplotlib.figure import Figure

from mmkd.base.errors import ConfigError
from mmkd.base.text import one_line
from mmkd.evaluate.compare import compare
from mmkd.evaluate.figures.style import BLUE, GREY, ROW, VERMILLION, asked, canvas
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.statistics import VERDICTS, Difference, Verdict
from mmkd.evaluate.table import build_table


def forest(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Difference to the best other model of each column, sorted, with paired intervals and the count of wins.

    The best rival is chosen on the same samples, which favours it: the comparison is strict on `model`.

    Raises:
        ConfigError: no such task, metric, head, share of labels or model, no other model, or nothing that both have.
    """
    table = build_table(folder, question)
    comparison = compare(folder, model, question)
    lines: list[tuple[str, str, Difference, Verdict | None]] = []
    for column in table.groups:
        rival = next(iter(table.best(column, besides=model)), None)
        for against in comparison.rivals:
            found = against.differences.get(column)
            if against.rival == rival and isinstance(found, Difference) and not math.isnan(found.value):
                lines.append((column, rival, found, against.verdicts.get(column)))
    if not lines:
        raise ConfigError(f"{table.title}: {model} and another model have no column in common to compare on")
    lines.sort(key=lambda line: line[2].value)
    scale = 100 if comparison.percent else 1
    figure, axes = canvas(7.0, 1.4 + ROW * len(lines))
    colours: dict[Verdict | None, str] = {"win": BLUE, "loss": VERMILLION, "tie": GREY, None: GREY}
    markers: dict[Verdict | None, str] = {"win": "o", "loss": "s", "tie": "D", None: "x"}
    for y, (_, _, one, verdict) in enumerate(lines):
        low, high = (one.value if math.isnan(bound) else bound for bound in (one.low, one.high))
        axes.plot([low * scale, high * scale], [y, y], color=colours[verdict], linewidth=1.5)
        axes.plot(one.value * scale, y, marker=markers[verdict], color=colours[verdict], markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(lines)),
        [f"{one_line(column)} (n={one.n}) against {rival}" for column, rival, one, _ in lines],
        fontsize=8,
    )
    count = Counter(verdict for *_, verdict in lines)
    totals = ", ".join(f"{count[kind]} {kind}" for kind in VERDICTS)
    totals += f", {count[None]} without interval" if count[None] else ""
    axes.set_title(f"{model} minus the best other: {totals}", fontsize=10, loc="left")
    unit = ", percentage points" if comparison.percent else ""
    # Under all of the picture: names at the left may leave the axes narrower than this.
    figure.supxlabel(f"{asked(question, table.metric)}{unit}; {comparison.level:.0%} paired intervals", fontsize=8)
    axes.set_ylim(-0.7, len(lines) - 0.3)
    return figure
