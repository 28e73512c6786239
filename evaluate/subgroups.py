"""Subgroups of a data set (sex, site, scanner, age) by one metric: values, and how far each lies from the rest."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from mmkd.base.errors import ConfigError
from mmkd.base.text import plain_values
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.splits import ranges, small_subgroups
from mmkd.evaluate.statistics import Difference, Replicates, averaged, holm, interval_text, p_text, paired_difference
from mmkd.evaluate.table import markdown_page, markdown_text


@dataclass(frozen=True)
class Subgroup:
    """One subgroup of a data set for one model. value, low, high: of the metric in it. gap: value minus that of all
    other subgroups together. p_holm: of the gap, adjusted for the subgroups of the column. n, groups: in it."""

    dataset: str
    model: str
    name: str
    n: int
    groups: int
    value: float
    low: float
    high: float
    gap: Difference
    p_holm: float


@dataclass(frozen=True)
class SubgroupTable:
    """Subgroups of all data sets that have a column, by one metric."""

    title: str
    column: str
    metric: str
    percent: bool
    rows: tuple[Subgroup, ...]
    notes: tuple[str, ...]

    @property
    def heads(self) -> list[str]:
        return ["data set", "model", self.column, "n", "groups", "value", "minus the rest", "p", "Holm"]

    def texts(self, row: Subgroup) -> list[str]:
        """Cells of a row as text."""
        form, scale = (".1f", 100) if self.percent else (".2f", 1)
        value, tests = interval_text(row.value, row.low, row.high, form, scale), map(p_text, (row.gap.p, row.p_holm))
        names = (row.dataset, row.model, row.name, str(row.n), str(row.groups))
        return [*names, value, row.gap.text(self.percent), *tests]

    def markdown(self) -> str:
        cells = [[markdown_text(text) for text in self.texts(row)] for row in self.rows]
        return markdown_page(self.title, self.heads, cells, list(self.notes))

    def json(self) -> str:
        rows = plain_values([asdict(row) for row in self.rows])
        return json.dumps({"title": self.title, "rows": rows, "notes": self.notes}, indent=1) + "\n"


def subgroup_table(folder: ResultFolder, question: Question, column: str, models: Sequence[str] = ()) -> SubgroupTable:
    """Compute a table from stored predictions. Raises ConfigError for an unknown model, task, metric, head or share, or
    a column that no data set has under `measures: subgroups`."""
    question, metric, scoring = folder.asked(question)
    if unknown := [name for name in models if name not in folder.plan.models]:
        raise ConfigError(f"{folder.out} has no model {unknown[0]!r}; it has {', '.join(folder.plan.models)}")
    divided = [spec for spec in folder.datasets(question) if column in spec.measures.subgroups]
    if not divided:
        known = {name for spec in folder.datasets(question) for name in spec.measures.subgroups}
        there = f"there are {', '.join(sorted(known))}" if known else "name columns under `measures: subgroups`"
        raise ConfigError(f"no data set of {question.task} has subgroups by {column!r}; {there}")
    rows: list[Subgroup] = []
    notes = dict.fromkeys(
        ["p from the paired resamples of a subgroup and the rest; Holm over the subgroups of a column"]
    )
    for spec in divided:
        for model in models or folder.plan.models:
            answers = folder.answers(question, spec.dataset, model)
            if isinstance(answers, str):
                notes[f"{model}, {spec.dataset}: {answers}"] = None
            else:
                rows += _of_model(folder, question, spec, column=column, model=model, answers=answers)
                divided_by = replace(answers[0], subgroups={column: answers[0].subgroups[column]})
                notes |= dict.fromkeys(f"{spec.dataset}: {text}" for text in small_subgroups(divided_by))
    head = f" {question.head}" if question.head else ""
    return SubgroupTable(
        title=f"{question.task}{head}, {metric} by {column}; suite {folder.plan.suite.suite}",
        column=column,
        metric=metric,
        percent=scoring.metrics[metric].share,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _of_model(
    folder: ResultFolder, question: Question, spec: DatasetSpec, *, column: str, model: str, answers: list[Predictions]
) -> list[Subgroup]:
    level = folder.plan.suite.bootstrap.level
    there, cuts = set(answers[0].subgroups[column].tolist()) - {""}, spec.measures.subgroups[column]
    names = [name for name in ranges(cuts) if name in there] if cuts else sorted(there)
    inside: dict[str, list[Replicates]] = {name: [] for name in names}
    rest: dict[str, list[Replicates]] = {name: [] for name in names}
    for one in answers:
        values = one.subgroups[column]
        for name in names:
            parts = {"inside": values == name, "rest": (values != name) & (values != "")}
            scored = folder.scored(question, spec, one, parts)
            inside[name].append(scored["inside"])
            rest[name].append(scored["rest"])
    found = []
    for name in names:
        own, other = (averaged(side[name], same_rows=True) for side in (inside, rest))
        gap = paired_difference(own, other, level)
        found.append(
            Subgroup(spec.dataset, model, name, own.n, own.groups, own.value, *own.interval(level), gap, math.nan)
        )
    # Of two subgroups each is the rest of the other: one test, not two.
    adjusted = holm([row.gap.p for row in found]) if len(found) != 2 else [row.gap.p for row in found]
    return [replace(row, p_holm=p) for row, p in zip(found, adjusted, strict=True)]
