"""Tables of one metric: models down, domains (or data sets, or modalities) and their mean across."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from mmkd.evaluate.cell import Cell, gather
from mmkd.evaluate.folder import By, Question, ResultFolder

MEAN = "mean"


@dataclass(frozen=True)
class ResultTable:
    """One metric of one task for all models.

    rows: models. columns: groups, then `mean` where there are several. cells: by (row, column).
    """

    title: str
    metric: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]
    percent: bool = True
    lower_is_better: bool = False

    def cell(self, row: str, column: str) -> Cell:
        """One cell.

        Raises:
            KeyError: no such row or column.
        """
        return self.cells[row, column]

    def value(self, row: str, column: str) -> float:
        """The number in one cell; NaN where there is none."""
        return self.cells[row, column].value

    def best(self, column: str) -> set[str]:
        """The row or rows with the best value of a column; none where no row has one."""
        values = {row: self.value(row, column) for row in self.rows if not math.isnan(self.value(row, column))}
        if not values:
            return set()
        wanted = min(values.values()) if self.lower_is_better else max(values.values())
        return {row for row, value in values.items() if value == wanted}

    def markdown(self) -> str:
        """A Markdown table with intervals, the best of every column in bold, and reasons for what is missing."""
        lines = [self.title, ""]
        lines.append("| model | " + " | ".join(self.heading(one).replace("|", r"\|") for one in self.columns) + " |")
        lines.append("|---|" + "---:|" * len(self.columns))
        best = {column: self.best(column) for column in self.columns}
        for row in self.rows:
            shown = []
            for column in self.columns:
                text = self._text(row, column)
                shown.append(f"**{text}**" if row in best[column] else text)
            lines.append(f"| {row} | " + " | ".join(shown) + " |")
        notes = self.notes()
        return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"

    def latex(self) -> str:
        """The same as a LaTeX tabular for booktabs."""
        lines = [rf"% {self.title}", rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}", r"\toprule"]
        lines.append(" & ".join(["model", *(_escaped(self.heading(c)) for c in self.columns)]) + r" \\ \midrule")
        best = {column: self.best(column) for column in self.columns}
        for row in self.rows:
            shown = [_escaped(row)]
            for column in self.columns:
                text = self._text(row, column)
                shown.append(rf"\textbf{{{text}}}" if row in best[column] else text)
            lines.append(" & ".join(shown) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in self.notes())]) + "\n"

    def csv(self) -> str:
        """One line a cell, numbers in full: model, column, value, low, high, n, missing, seed_sd, reason."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["model", "column", "value", "low", "high", "n", "missing", "seed_sd", "reason"])
        for record in self.records():
            writer.writerow(["" if value is None else value for value in record.values()])
        return buffer.getvalue()

    def json(self) -> str:
        """The same as JSON; what has no value is null."""
        return json.dumps({"title": self.title, "cells": self.records()}, indent=1) + "\n"

    def records(self) -> list[dict[str, str | float | int | None]]:
        """One flat record a cell, in order of rows, then columns."""
        found: list[dict[str, str | float | int | None]] = []
        for row in self.rows:
            for column in self.columns:
                cell = self.cells[row, column]
                numbers = {"value": cell.value, "low": cell.low, "high": cell.high}
                record: dict[str, str | float | int | None] = {"model": row, "column": column}
                record |= {name: None if math.isnan(number) else number for name, number in numbers.items()}
                record |= {"n": cell.n, "missing": cell.missing}
                record |= {"seed_sd": None if math.isnan(cell.seed_sd) else cell.seed_sd, "reason": cell.reason}
                found.append(record)
        return found

    def notes(self) -> list[str]:
        """What a reader must know of single cells: why there is no value, and how many samples were not scored."""
        found = []
        for (row, column), cell in self.cells.items():
            if cell.reason:
                found.append(f"{row}, {column}: {cell.reason}")
            elif cell.missing and column != MEAN:
                found.append(f"{row}, {column}: {cell.missing} of {cell.n + cell.missing} samples without features")
        return found

    def heading(self, column: str) -> str:
        """A column's name with the samples behind it."""
        counts = {self.cells[row, column].n for row in self.rows if not self.cells[row, column].reason}
        if column == MEAN or not counts:
            return column
        return f"{column} (n={min(counts)})" if len(counts) == 1 else f"{column} (n={min(counts)}-{max(counts)})"

    def shown(self, row: str, column: str) -> tuple[str, str]:
        """A value and its interval as text; `-` and nothing where there is none, `*` where samples are missing."""
        cell = self.cells[row, column]
        if math.isnan(cell.value):
            return "-", ""
        scale = 100 if self.percent else 1
        value = f"{cell.value * scale:.1f}{'*' if cell.missing else ''}"
        return value, "" if math.isnan(cell.low) else f"[{cell.low * scale:.1f}, {cell.high * scale:.1f}]"

    def _text(self, row: str, column: str) -> str:
        return " ".join(part for part in self.shown(row, column) if part)


def result_table(
    out: str | Path,
    task: str,
    metric: str | None = None,
    by: By = "domain",
    head: str | None = None,
    fraction: float = 1.0,
) -> ResultTable:
    """Compute a table from the stored predictions of the last run into `out`.

    Args:
        out: folder that `run_suite` filled.
        task: for example `zero_shot`.
        metric: by default the task's primary one.
        by: what the columns are. `domain` divides the rows of each data set by its domain column.
        head: direction or kind of head, by default the task's first (retrieval: `i2t`).
        fraction: share of the labels.

    Raises:
        ConfigError: nothing was run, or there is no such task, metric, head or share.
        CorruptStoreError: stored results cannot be read.
    """
    return build_table(ResultFolder(Path(out)), Question(task, metric, head, fraction, by))


def build_table(folder: ResultFolder, question: Question) -> ResultTable:
    """The table that answers a question; see `result_table`."""
    scoring, metric = folder.scoring(question)
    gathered = gather(folder, question)
    columns = gathered.columns
    suite = folder.plan.suite
    cells: dict[tuple[str, str], Cell] = {}
    for model in folder.plan.models:
        for column in columns:
            cells[model, column] = gathered.cell(model, [column], suite.bootstrap.level)
        if len(columns) > 1:
            cells[model, MEAN] = gathered.cell(model, columns, suite.bootstrap.level)
    head = question.head or next((u.head for u in folder.plan.units if u.task == question.task), "")
    parts = [
        f"{question.task}{f' {head}' if head else ''}, {metric}",
        "in percent" if metric not in scoring.not_shares else "",
        f"protocol {scoring.protocol}",
        f"{question.fraction:.0%} of labels" if question.fraction < 1 else "",
        f"{suite.bootstrap.level:.0%} intervals from {suite.bootstrap.n} resamples",
        f"suite {suite.suite} version {suite.version}",
        _coverage(folder, question),
    ]
    return ResultTable(
        title="; ".join(part for part in parts if part),
        metric=metric,
        rows=folder.plan.models,
        columns=(*columns, MEAN) if len(columns) > 1 else tuple(columns),
        cells=cells,
        percent=metric not in scoring.not_shares,
        lower_is_better=metric in scoring.lower_is_better,
    )


def _coverage(folder: ResultFolder, question: Question) -> str:
    """How many of the suite's data sets are in a table, where some are not extracted."""
    wanted = [spec for spec in folder.plan.suite.datasets if question.task in spec.tasks]
    absent = [spec for spec in wanted if spec.dataset in folder.plan.absent]
    return f"{len(wanted) - len(absent)} of its {len(wanted)} data sets with this task" if absent else ""


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def _escaped(text: str) -> str:
    return text.translate(_LATEX)
