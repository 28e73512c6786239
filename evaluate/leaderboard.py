"""Leaderboard: all models on all tasks of a suite with intervals, wins and losses, and what `trust` measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmkd.base.errors import CorruptStoreError
from mmkd.base.text import number
from mmkd.evaluate.compare import compare
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.merge import read_trust
from mmkd.evaluate.report import write_page
from mmkd.evaluate.statistics import VERDICTS
from mmkd.evaluate.table import build_table
from mmkd.evaluate.trust import MEASURES


def write_leaderboard(folder: ResultFolder, target: Path) -> None:
    """Write the page `target`, which needs no other file. Raises StoreError if the disk is full or read-only,
    CorruptStoreError as `read_trust`."""
    sections = [_section(folder, question) for question in folder.questions(None, None, by="dataset")]
    trust = list(read_trust(folder.out).values())
    totals: dict[str, Counter[str]] = {}
    for model in folder.plan.models:
        totals[model] = sum((one["counts"][model] for one in sections), Counter())
    order = sorted(totals, key=lambda model: totals[model]["loss"] - totals[model]["win"])
    standings = [{"model": model, "counts": _all_verdicts(totals[model])} for model in order]
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
    found = next((one["measures"].get(name) for one in content["models"] if one["model"] == model), None)
    if found is None or found["value"] is None:
        return "-"
    return number(found["value"]) + (
        "" if found["low"] is None else f" [{number(found['low'])}, {number(found['high'])}]"
    )


def _section(folder: ResultFolder, question: Question) -> dict[str, Any]:
    """Table of one task, models sorted by its last column, and every model's verdicts against all others."""
    table = build_table(folder, question)
    models = folder.plan.models
    counts: dict[str, Counter[str]] = {model: Counter() for model in models}
    mirrored = {"win": "loss", "tie": "tie", "loss": "win"}
    for i, model in enumerate(models[:-1]):
        for rival in models[i + 1 :]:
            try:
                (found,) = compare(folder, model, question, (rival,)).rivals
            except CorruptStoreError:  # other samples: a table is possible, a paired comparison is not
                counts[model]["none"] += 1
                counts[rival]["none"] += 1
                continue
            for column in found.differences:
                verdict = found.verdicts.get(column)
                counts[model][verdict or "none"] += 1
                counts[rival][mirrored[verdict] if verdict else "none"] += 1
    column, sign = table.columns[-1], 1 if table.lower_is_better else -1
    values = {model: sign * table.value(model, column) for model in models}
    order = sorted(models, key=lambda model: (values[model] != values[model], values[model]))
    name = " ".join(filter(None, (question.task, question.head)))
    return {
        "name": name,
        "table": table,
        "order": order,
        "counts": {one: _all_verdicts(c) for one, c in counts.items()},
    }


def _all_verdicts(counts: Counter[str]) -> Counter[str]:
    return Counter({verdict: counts[verdict] for verdict in (*VERDICTS, "none")})
