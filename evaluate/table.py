"""Tables of one metric: models down, domains (or data sets, or modalities) and their mean across."""

import csv
import itertools
import json
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mmkd.base.text import counted, one_line, plain_values
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.folder import By, Question, ResultFolder
from mmkd.evaluate.statistics import FEWEST_GROUPS, TOLERANCE, Replicates, averaged

Parts = list[list[Replicates] | str]
"""Of each data set of a column a value per draw of the labels, or why there is none."""


@dataclass(frozen=True)
class Cell:
    """One value, or the reason why there is none. n: samples behind it. missing: samples that the model has no features
    for. seed_sd: standard deviation over draws of the labels, where several were made. unlike: scored on another
    gallery or other candidates than the models that have features of most samples."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    missing: int = 0
    seed_sd: float = math.nan
    reason: str = ""
    unlike: bool = False

    @property
    def starred(self) -> bool:
        """Whether the value is of other samples than those of a model that has features of all."""
        return self.missing > 0 or self.unlike


@dataclass(frozen=True)
class ResultTable:
    """One metric of one task for all models. rows: models. columns: groups, then their mean where there are several.
    cells: by (row, column). mean: name of that last column, or empty. warnings: about the predictions."""

    title: str
    metric: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]
    percent: bool = True
    lower_is_better: bool = False
    mean: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """The columns without their mean."""
        return self.columns[:-1] if self.mean else self.columns

    @property
    def scale(self) -> int:
        """Factor on values as they are printed."""
        return 100 if self.percent else 1

    def count(self, column: str) -> int:
        """Samples behind a column, of the model that has most."""
        return max(self.cells[row, column].n for row in self.rows)

    def cell(self, row: str, column: str) -> Cell:
        return self.cells[row, column]

    def value(self, row: str, column: str) -> float:
        return self.cells[row, column].value

    def best(self, column: str, besides: str | None = None) -> tuple[str, ...]:
        """Return rows with the best value of a column, within `TOLERANCE`; none where no row has a value. Starred
        values are of other samples: they only compete where no other is."""
        sign = -1 if self.lower_is_better else 1
        rows = [row for row in self.rows if row != besides and not math.isnan(self.value(row, column))]
        rows = [row for row in rows if not self.cell(row, column).starred] or rows
        values = {row: sign * self.value(row, column) for row in rows}
        best = max((value for value in values.values() if not math.isnan(value)), default=math.nan)
        return tuple(row for row, value in values.items() if value >= best - TOLERANCE)

    def markdown(self) -> str:
        heads = ["model", *map(self.heading, self.columns)]
        rows = [[markdown_text(row), *self._texts(row, "**{}**")] for row in self.rows]
        return markdown_page(self.title, heads, rows, self.notes())

    def latex(self) -> str:
        """A tabular for booktabs."""
        heads = ["model", *(latex_text(self.heading(column)) for column in self.columns)]
        lines = [f"% {one_line(self.title)}", rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}", r"\toprule"]
        lines.append(" & ".join(heads) + r" \\ \midrule")
        lines += [" & ".join([latex_text(row), *self._texts(row, r"\textbf{{{}}}")]) + r" \\" for row in self.rows]
        notes = (f"% {one_line(note)}" for note in self.notes())
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes]) + "\n"

    def csv(self) -> str:
        """One line a cell, numbers in full. Text that a spreadsheet would run as a formula gets a `'` in front."""
        lines: list[str] = []
        writer = csv.writer(SimpleNamespace(write=lines.append))  # its "\r\n" makes it quote both characters in names
        writer.writerow(["model", "column", "value", "low", "high", "n", "missing", "seed_sd", "reason"])
        formula = tuple("=+-@\t\r")
        for record in self.records():
            cells = record.values()
            writer.writerow(f"'{one}" if isinstance(one, str) and one.startswith(formula) else one for one in cells)
        return "".join(f"{line[:-2]}\n" for line in lines)

    def json(self) -> str:
        return json.dumps({"title": self.title, "cells": self.records()}, indent=1) + "\n"

    def records(self) -> list[dict[str, Any]]:
        return [
            {"model": row, "column": column} | plain_values(asdict(self.cells[row, column]))
            for row in self.rows
            for column in self.columns
        ]

    def notes(self) -> list[str]:
        """Reasons for missing values, numbers of unscored samples, and warnings."""
        found = []
        for (row, column), cell in self.cells.items():
            if cell.reason:
                found.append(f"{row}, {column}: {cell.reason}")
            elif cell.missing and column in self.groups:
                found.append(f"{row}, {column}: {cell.missing} of {cell.n + cell.missing} samples without features")
        if any(cell.starred for cell in self.cells.values()):
            found.append(
                "* is of fewer samples, or of another gallery or other candidates: never the best beside others"
            )
        return [*found, *self.warnings]

    def heading(self, column: str) -> str:
        counts = {self.cells[row, column].n for row in self.rows if not self.cells[row, column].reason}
        if column not in self.groups or not counts:
            return column
        return f"{column} (n={min(counts)})" if len(counts) == 1 else f"{column} (n={min(counts)}-{max(counts)})"

    def shown(self, row: str, column: str) -> tuple[str, str]:
        """A value and its interval as text; `-` where there is none, `*` where it is of other samples."""
        cell = self.cells[row, column]
        if math.isnan(cell.value):
            return "-", ""
        value, low, high = (one * self.scale for one in (cell.value, cell.low, cell.high))
        digits = 1 if self.percent else 2
        interval = "" if math.isnan(low) else f"[{low:.{digits}f}, {high:.{digits}f}]"
        return f"{value:.{digits}f}{'*' if cell.starred else ''}", interval

    def _texts(self, row: str, bold: str) -> list[str]:
        texts = {column: " ".join(self.shown(row, column)).strip() for column in self.columns}
        return [bold.format(text) if row in self.best(column) else text for column, text in texts.items()]


def result_table(
    out: str | Path,
    task: str,
    metric: str | None = None,
    by: By = "domain",
    head: str | None = None,
    fraction: float = 1.0,
    suite: str | None = None,
) -> ResultTable:
    """Compute a table (see `Question`) from the stored predictions of the last run of `suite`, or of the only one, into
    `out`. Raises ConfigError if nothing was run, or there is no such task, metric, head or share; CorruptStoreError if
    stored results cannot be read."""
    return build_table(ResultFolder(Path(out), suite), Question(task, metric, head, fraction, by))


def build_table(folder: ResultFolder, question: Question) -> ResultTable:
    question, metric, scoring = folder.asked(question)
    suite, scored, every = folder.plan.suite, folder.datasets(question), folder.datasets(replace(question, metric=None))
    parts: dict[str, dict[str, Parts]] = {model: {} for model in folder.plan.models}
    warnings: list[str] = []
    unlike: set[tuple[str, str]] = set()
    for spec in scored:
        unlike |= _gather(folder, question, spec, parts, warnings)
    columns = tuple(next(iter(parts.values())))
    mean = mean_name(columns) if len(columns) > 1 else ""
    cells: dict[tuple[str, str], Cell] = {}
    for model, own in parts.items():
        cells |= {(model, column): _cell({column: own[column]}, suite.bootstrap.level) for column in columns}
        if mean:
            cells[model, mean] = _cell(own, suite.bootstrap.level)
            unlike |= {(model, mean)} if any((model, column) in unlike for column in columns) else set()
    cells = {place: replace(cell, unlike=place in unlike) for place, cell in cells.items()}
    head = question.head or next((u.head for u in folder.plan.units if u.task == question.task), "")
    wanted = [spec.dataset for spec in suite.datasets if question.task in spec.tasks]
    extracted = [name for name in wanted if name not in folder.plan.absent]
    title = [
        f"{question.task}{f' {head}' if head else ''}, {metric}",
        "in percent" if scoring.metrics[metric].share else "",
        f"protocol {scoring.protocol}",
        f"{question.fraction:.0%} of labels" if question.fraction < 1 else "",
        f"{suite.bootstrap.level:.0%} intervals from {suite.bootstrap.n} resamples",
        f"suite {suite.suite} version {suite.version}",
        f"{len(extracted)} of its {len(wanted)} data sets with this task" if len(extracted) < len(wanted) else "",
        f"{len(scored)} of {len(every)} data sets have this metric" if len(scored) < len(every) else "",
    ]
    return ResultTable(
        title="; ".join(filter(None, title)),
        metric=metric,
        rows=folder.plan.models,
        columns=(*columns, mean) if mean else columns,
        cells=cells,
        percent=scoring.metrics[metric].share,
        lower_is_better=scoring.metrics[metric].lower,
        mean=mean,
        warnings=tuple(warnings),
    )


def _gather(
    folder: ResultFolder, question: Question, spec: DatasetSpec, parts: dict[str, dict[str, Parts]], warnings: list[str]
) -> set[tuple[str, str]]:
    """Score every model on every column of a data set. A failed unit leaves its reason in each of them. Return models
    and columns whose gallery or candidates are others than those of the model that lacks fewest samples."""
    answers = {model: folder.answers(question, spec.dataset, model) for model in folder.plan.models}
    names: dict[str, None] = {}
    for model, found in answers.items():
        if not isinstance(found, str):
            names |= dict.fromkeys(folder.column_names(question, spec, found[0]).tolist())
            warned = dict.fromkeys(warning for one in found for warning in one.info.get("warnings", ()))
            warnings.extend(f"{model}, {spec.dataset}: {warning}" for warning in warned)
    few: dict[str, int] = {}
    for model, found in answers.items():
        scored = [] if isinstance(found, str) else [folder.replicates(question, spec, one) for one in found]
        for column in names or [spec.modality if question.by == "modality" else spec.dataset]:
            part = found if isinstance(found, str) else [draw[column] for draw in scored]
            parts[model].setdefault(column, []).append(part)
            if not isinstance(part, str) and part[0].informative < FEWEST_GROUPS:
                few[column] = part[0].informative
    warnings.extend(
        f"{spec.dataset}, {column}: {counted(n, 'group')} (of the rarer class where there are classes), "
        f"an interval needs {FEWEST_GROUPS}"
        for column, n in few.items()
    )
    run = {model: found for model, found in answers.items() if not isinstance(found, str)}
    choices = {model: {one.info.get("choices") for one in found} for model, found in run.items()}
    lacking = {model: sum(int((~one.available).sum()) for one in found) for model, found in run.items()}
    usual = choices[min(lacking, key=lacking.__getitem__)] if run else set()
    return {(model, column) for model in run if choices[model] != usual for column in names}


def _cell(columns: dict[str, Parts], level: float) -> Cell:
    """Return the unweighted mean over columns and their data sets. One missing part leaves the whole cell without a
    value: a mean over fewer data sets is another number."""
    by_column = []
    for column, parts in columns.items():
        scored = [part for part in parts if not isinstance(part, str)]
        if len(scored) < len(parts):
            failed = next(part for part in parts if isinstance(part, str))
            return Cell(math.nan, reason=failed if len(columns) == 1 else f"no value in {column}")
        by_column.append([averaged(same_draw) for same_draw in zip(*scored, strict=True)])
    draws = [averaged(same_draw) for same_draw in zip(*by_column, strict=True)]
    whole = averaged(draws, same_rows=True)
    if math.isnan(whole.value):
        return Cell(math.nan, n=whole.n, missing=whole.missing, reason=whole.reason)
    spread = float(np.std([draw.value for draw in draws], ddof=1)) if len(draws) > 1 else math.nan
    return Cell(whole.value, *whole.interval(level), whole.n, whole.missing, spread)


def mean_name(columns: Collection[str]) -> str:
    """Return a name for the mean over columns: `mean` unless a column has that name."""
    return next(name for n in itertools.count(1) if (name := f"mean {n}" if n > 1 else "mean") not in columns)


def markdown_page(title: str, heads: list[str], rows: list[list[str]], notes: list[str]) -> str:
    """A title, a table with heads and with rows whose cells are Markdown already, and a list of notes."""
    lines = [markdown_text(title), "", *(f"| {' | '.join(cells)} |" for cells in (map(markdown_text, heads), *rows))]
    lines.insert(3, "|---|" + "---:|" * (len(heads) - 1))
    return "\n".join([*lines, *([""] if notes else []), *(f"- {markdown_text(note)}" for note in notes)]) + "\n"


def markdown_text(text: str) -> str:
    """`text` on one line, without anything that Markdown (with tables and mathematics) reads as more than text."""
    return re.sub(r"[\\`*|<>$~&]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}"}
)


def latex_text(text: str) -> str:
    """`text` on one line as LaTeX sets it: brackets do not belong to the line break before them, dashes do not join."""
    return re.sub("-(?=-)", "-{}", one_line(text).translate(_LATEX))
