"""Report page: tables, comparisons, figures, failures and methods."""

from __future__ import annotations

import contextlib
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmkd.base.errors import ConfigError, CorruptStoreError
from mmkd.base.files import write_atomically
from mmkd.evaluate.compare import compare
from mmkd.evaluate.drawing import rendered
from mmkd.evaluate.figures import FIGURES
from mmkd.evaluate.folder import By, Question, ResultFolder
from mmkd.evaluate.statistics import p_text
from mmkd.evaluate.subgroups import subgroup_table
from mmkd.evaluate.table import build_table


def write_report(out: Path, model: str, target: Path, by: By = "domain", suite: str | None = None) -> None:
    """Write the page `target`, which needs no other file, of a folder that `run_suite` filled; `model` is compared with
    all others. Raises ConfigError if nothing was run, or several suites and none is named, or there is no such model;
    StoreError if the disk is full or read-only."""
    folder = ResultFolder(out, suite)
    if model not in folder.plan.models:
        raise ConfigError(f"{out} has no model {model!r}; it has {', '.join(folder.plan.models)}")
    sections = []
    for question in folder.questions(None, None, by=by):  # at all labels, then at smaller shares where there are some
        shares = {unit.fraction for unit in folder.plan.units if unit.task == question.task}
        asked = [replace(question, fraction=share) for share in sorted(shares, reverse=True)]
        sections += [_section(folder, one, model) for one in asked]
    answers = [(str(unit), folder.predictions(unit)) for unit in folder.plan.units]
    write_page(
        target,
        "report.html",
        suite=folder.plan.suite,
        model=model,
        models=folder.plan.models,
        sections=sections,
        failed=[(name, reason) for name, reason in answers if isinstance(reason, str)],
        p=p_text,
    )


def write_page(target: Path, template: str, **values: Any) -> None:
    """Write a page that opens offline from one of the templates. Raises StoreError if the disk is full or
    read-only."""
    environment = Environment(
        loader=PackageLoader("mmkd.evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(template).render(version=importlib.metadata.version("mmkd"), **values)
    write_atomically(target, page.encode())


def _section(folder: ResultFolder, question: Question, model: str) -> dict[str, Any]:
    table = build_table(folder, question)
    others = [one for one in folder.metrics(question) if one != table.metric]
    comparison = None
    if len(folder.plan.models) > 1:
        # With different samples a table is possible, a paired comparison is not.
        with contextlib.suppress(CorruptStoreError):
            comparison = compare(folder, model, question)
    pictures = []
    trivial = ("heat-map", "forest", "box") if len(table.rows) == 1 else ("box",) if len(table.columns) == 1 else ()
    for name in FIGURES if question.fraction == 1 else ("heat-map", "forest"):
        if name in trivial:
            continue
        with contextlib.suppress(ConfigError):  # the task cannot have it: one share of labels, no survival times
            markup = rendered(FIGURES[name](folder, question, model), "svg").decode()
            text = f"{name.replace('-', ' ')} of {table.title}"
            pictures.append({"svg": markup[markup.index("<svg") :], "text": text})
    share = "" if question.fraction == 1 else f"with {question.fraction:.0%} of the labels"
    return {
        "name": " ".join(part for part in (question.task, question.head or "", share) if part),
        "question": question,
        "table": table,
        "subgroups": [
            subgroup_table(folder, question, column, [model])
            for column in dict.fromkeys(name for spec in folder.datasets(question) for name in spec.measures.subgroups)
        ],
        "further": [build_table(folder, replace(question, metric=one)) for one in others],
        "comparison": comparison,
        "pictures": pictures,
    }
