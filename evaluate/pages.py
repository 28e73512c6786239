"""Pages that open offline and need no other file: the report of a suite, its leaderboard, trust in a model."""

import contextlib
import importlib.metadata
import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from mmkd.base.errors import ConfigError, CorruptStoreError
from mmkd.base.files import write_atomically
from mmkd.base.text import number
from mmkd.evaluate.compare import compare
from mmkd.evaluate.corruption_report import CorruptionReport
from mmkd.evaluate.drawing import BLUE, GRAY, VERMILLION, line_style, rendered, short_names
from mmkd.evaluate.figures import FIGURES
from mmkd.evaluate.folder import By, Question, ResultFolder
from mmkd.evaluate.merge import read_trust
from mmkd.evaluate.statistics import interval_text, p_text
from mmkd.evaluate.subgroups import subgroup_table
from mmkd.evaluate.table import build_table
from mmkd.evaluate.trust import MEASURES, ModelTrust, TrustReport


def write_page(target: Path, template: str, **values: Any) -> None:
    """Write a page that opens offline from one of the templates. Raises StoreError if the disk is full or
    read-only."""
    environment = Environment(
        loader=PackageLoader("mmkd.evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(template).render(version=importlib.metadata.version("mmkd"), **values)
    write_atomically(target, page.encode())


def inline_svg(figure: Figure) -> str:
    """Markup of a figure within a page."""
    markup = rendered(figure, "svg").decode()
    return markup[markup.index("<svg") :]


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
            drawn = FIGURES[name](folder, question, model)
            pictures.append({"svg": inline_svg(drawn), "text": f"{name.replace('-', ' ')} of {table.title}"})
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


def write_leaderboard(folder: ResultFolder, target: Path) -> None:
    """Write the page `target`, which needs no other file. Raises StoreError if the disk is full or read-only,
    CorruptStoreError as `read_trust`."""
    sections = [_standing(folder, question) for question in folder.questions(None, None, by="dataset")]
    trust = list(read_trust(folder.out).values())
    totals = {model: sum((one["counts"][model] for one in sections), Counter[str]()) for model in folder.plan.models}
    order = sorted(totals, key=lambda model: totals[model]["loss"] - totals[model]["win"])
    standings = [{"model": model, "counts": totals[model]} for model in order]
    digests: dict[str, tuple[str, dict[str, str]]] = {}
    for unit in folder.plan.units:
        if unit.data_digest:
            digests.setdefault(unit.dataset, (unit.data_digest, {}))[1][unit.model] = unit.features_digest
    keys = {unit.key for unit in folder.plan.units} & folder.results.keys()
    codes = {f"{one.code_version} ({one.code_digest})" for key in keys for one in folder.results[key]}
    write_page(
        target,
        "leaderboard.html",
        suite=folder.plan.suite,
        standings=standings,
        sections=sections,
        trust=trust,
        titles=MEASURES,
        cell=trust_cell,
        codes=sorted(codes),
        digests=digests,
    )


def trust_cell(content: dict[str, Any], model: str, name: str) -> str:
    """A measure of a model in a file of `trust`, with its interval; `-` where there is none."""
    found = next((one["measures"].get(name) for one in content["models"] if one["model"] == model), None) or {}
    value, low, high = (math.nan if (one := found.get(part)) is None else one for part in ("value", "low", "high"))
    return interval_text(value, low, high, ".3f")


def _standing(folder: ResultFolder, question: Question) -> dict[str, Any]:
    """Table of one task, models sorted by its last column, and every model's verdicts against all others."""
    table = build_table(folder, question)
    models = folder.plan.models
    counts = {model: Counter[str]() for model in models}
    mirrored = {"win": "loss", "tie": "tie", "loss": "win", "none": "none"}
    for model, rival in itertools.combinations(models, 2):
        verdicts = ["none"]
        with contextlib.suppress(CorruptStoreError):  # other samples: a table is possible, a paired comparison is not
            (found,) = compare(folder, model, question, (rival,)).rivals
            verdicts = [found.verdicts.get(column, "none") for column in found.differences]
        counts[model].update(verdicts)
        counts[rival].update(mirrored[verdict] for verdict in verdicts)
    column, sign = table.columns[-1], 1 if table.lower_is_better else -1
    values = {model: sign * table.value(model, column) for model in models}
    order = sorted(models, key=lambda model: (values[model] != values[model], values[model]))
    name = " ".join(filter(None, (question.task, question.head)))
    return {"name": name, "table": table, "order": order, "counts": counts}


def write_trust(out: Path, report: TrustReport) -> list[Path]:
    """Write `DATASET.json` and a page for each model, `DATASET.MODEL.html`, into `out`; return their paths. Raises
    StoreError if the disk is full or read-only."""
    name = report.cohort.dataset
    written = [out / f"{name}.json"]
    write_atomically(written[0], report.as_json().encode())
    caption = "Left: over the number of neighbors k. Right: over the correlation of class and site in training."
    for one in report.models:
        written.append(out / f"{name}.{quote(one.model, safe='')}.html")
        write_page(
            written[-1],
            "trust.html",
            report=report,
            one=one,
            titles=MEASURES,
            differences=report.differences(one.model),
            svg=inline_svg(trust_figure(report, one)),
            caption=caption,
            number=number,
            p=p_text,
        )
    return written


def write_corruptions(out: Path, report: CorruptionReport) -> Path:
    """Write `DATASET.json` and the page `DATASET.html` into `out`; return the page's path. Raises StoreError if the
    disk is full or read-only."""
    target = out / f"{report.dataset}.html"
    write_atomically(target.with_suffix(".json"), report.as_json().encode())
    pictures = [
        {"svg": inline_svg(corruption_figure(report, task)), "text": f"{task} over severity; left end: clean"}
        for task in dict.fromkeys(one.task for one in report.drops)
    ]
    write_page(target, "corruptions.html", report=report, sections=list(zip(report.tables(), pictures, strict=True)))
    return target


def corruption_figure(report: CorruptionReport, task: str) -> Figure:
    """One panel for each family: the metric of every model over severity, with intervals."""
    families, across = list(dict.fromkeys(one.family for one in report.drops if one.severity)), 4
    down = -(-len(families) // across)
    figure = Figure(figsize=(9, 0.6 + 1.9 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, family in itertools.zip_longest(panels, families):
        if family is None:
            panel.set_visible(False)
            continue
        panel.set_title(family, fontsize=8)
        for place, model in enumerate(report.models):
            found = [one for one in report.drops if (one.task, one.model, one.family) == (task, model, family)]
            if not found:  # a family that no image has for this model
                continue
            values = [found[0].clean, *(one.value for one in found)]
            style = line_style(place) | {"markersize": 3, "linewidth": 1}
            (line,) = panel.plot(
                [0, *(one.severity for one in found)], values, label=short_names([model], 24)[0], **style
            )
            limits = np.array([(one.severity, one.low, one.high) for one in found]).T
            panel.fill_between(*limits, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.tick_params(labelsize=7)
    # Of all panels: a model may lack the first family.
    named = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend([*named.values()], [*named], loc="outside lower center", ncols=4, fontsize=7)
    return figure


def trust_figure(report: TrustReport, one: ModelTrust) -> Figure:
    """Robustness index and k-NN accuracies over k; accuracy over Cramer's V of the training rows."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ks, index, biology, site = np.array(one.curve).T
    left.plot(ks, index, color=BLUE, label="robustness index")
    left.axhline(report.chance, color=BLUE, linestyle=":", linewidth=1, label="its chance value")
    left.plot(ks, biology, color=GRAY, linestyle="--", label=f"accuracy of {report.cohort.biology_column}"[:40])
    left.plot(ks, site, color=VERMILLION, linestyle="-.", label=f"accuracy of {report.cohort.confounder_column}"[:40])
    left.axvline(report.k, color=GRAY, linewidth=0.6)
    left.set(xlabel=f"k (used: {report.k})", ylim=(0, 1.02))
    left.legend(fontsize=7, loc="best")
    for column, label, color in ((1, "same sites", BLUE), (2, "other sites", VERMILLION)):
        values = [(level[0], level[column]) for level in one.drop]
        if values and not np.isnan([value for _, value in values]).any():
            right.plot(*zip(*values, strict=True), marker="o", color=color, label=label)
    right.set(xlabel="Cramér's V of class and site in training", ylabel="accuracy in test", ylim=(0, 1.02))
    if one.drop:
        right.legend(fontsize=7, loc="lower left")
    else:
        right.text(0.5, 0.5, "not measured", ha="center", transform=right.transAxes)
    return figure
