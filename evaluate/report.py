"""Report page: tables, comparisons, figures, failures and methods."""

from __future__ import annotations

import contextlib
import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmkd.base.errors import ConfigError, CorruptStoreError
from mmkd.base.files import write_atomically
from mmkd.evaluate.compare import Comparison, compare
from mmkd.evaluate.figures import FIGURES, rendered
from mmkd.evaluate.folder import By, Question, ResultFolder
from mmkd.evaluate.statistics import p_text
from mmkd.evaluate.table import ResultTable, build_table

DRAWN = ("heat-map", "forest", "box", "radar", "label-efficiency", "kaplan-meier")
"""Figures of a report, in the order that a reader should see them; those that a task cannot have are left out."""


@dataclass(frozen=True)
class Picture:
    """A figure in the page. svg: markup. text: its description for screen readers."""

    name: str
    svg: str
    text: str


@dataclass(frozen=True)
class Section:
    """One task in one head at one share of labels: its table, its comparison, its figures. further: tables of the
    metrics that are not the primary one."""

    name: str
    question: Question
    table: ResultTable
    further: tuple[ResultTable, ...]
    comparison: Comparison | None
    pictures: tuple[Picture, ...]


def write_report(out: Path, model: str, target: Path, by: By = "domain", suite: str | None = None) -> None:
    """Write the page `target` of a folder that `run_suite` filled; it needs no network and no other file. `model` is
    compared with all others; `suite` is needed where several were run into the folder. Raises ConfigError if nothing
    was run, or there is no such model. Raises StoreError if the disk is full or read-only."""
    folder = ResultFolder(out, suite)
    if model not in folder.plan.models:
        raise ConfigError(f"{out} has no model {model!r}; it has {', '.join(folder.plan.models)}")
    sections = []
    for question in folder.questions(None, None, by=by):  # at all labels, then at smaller shares where there are some
        shares = {unit.fraction for unit in folder.plan.units if unit.task == question.task}
        asked = [replace(question, fraction=share) for share in sorted(shares, reverse=True)]
        sections += [_section(folder, one, model) for one in asked]
    environment = Environment(
        loader=PackageLoader("mmkd.evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html").render(
        suite=folder.plan.suite,
        model=model,
        models=folder.plan.models,
        sections=sections,
        failed=failures(folder),
        p=p_text,
        version=importlib.metadata.version("mmkd"),
    )
    write_atomically(target, page.encode())


def failures(folder: ResultFolder) -> list[tuple[str, str]]:
    """Return units without a result and why, in the order of the plan."""
    found = [(str(unit), folder.predictions(unit)) for unit in folder.plan.units]
    return [(name, reason) for name, reason in found if isinstance(reason, str)]


def _section(folder: ResultFolder, question: Question, model: str) -> Section:
    table = build_table(folder, question)
    scoring, metric = folder.scoring(question)
    further = tuple(build_table(folder, replace(question, metric=one)) for one in scoring.metrics if one != metric)
    comparison = None
    if len(folder.plan.models) > 1:
        # With different samples a table is possible, a paired comparison is not.
        with contextlib.suppress(CorruptStoreError):
            comparison = compare(folder, model, question)
    drawn = DRAWN if question.fraction == 1 else ("heat-map", "forest")
    pictures = [picture for name in drawn if (picture := _picture(folder, question, model, name, table)) is not None]
    share = "" if question.fraction == 1 else f"with {question.fraction:.0%} of the labels"
    name = " ".join(part for part in (question.task, question.head or "", share) if part)
    return Section(name, question, table, further, comparison, tuple(pictures))


def _picture(folder: ResultFolder, question: Question, model: str, name: str, table: ResultTable) -> Picture | None:
    """Return a figure, or None if the task cannot have it: one share of labels, one model, no survival times."""
    if (len(table.rows) == 1 and name in ("heat-map", "forest", "box")) or (len(table.columns) == 1 and name == "box"):
        return None
    try:
        figure = FIGURES[name](folder, question, model)
    except ConfigError:
        return None
    markup = rendered(figure, "svg").decode()
    return Picture(name, markup[markup.index("<svg") :], f"{name.replace('-', ' ')} of {table.title}")
