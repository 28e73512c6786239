"""One model against each other: paired on the same samples, never an average of unlike metrics. Claims `A beats B on
TASK`: yes, no, or cannot tell."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from mmkd.base.errors import ConfigError, CorruptStoreError, MmkdError
from mmkd.base.text import counted, plain_values
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.statistics import (
    FEWEST_GROUPS,
    VERDICTS,
    Difference,
    Replicates,
    Verdict,
    averaged,
    holm,
    p_text,
    paired_difference,
    signed_rank_p,
)
from mmkd.evaluate.table import markdown_page, markdown_text, mean_name

Pair = tuple[Replicates, Replicates]
Answer = Literal["yes", "no", "cannot tell"]
ANSWERS: dict[Verdict | None, Answer] = {"win": "yes", "loss": "no"}
EVERY = "all"
"""In place of a rival: every other model."""
FEWEST_BEYOND = 5
"""Resamples that must lie beyond a limit for it to be known."""


@dataclass(frozen=True)
class Against:
    """A model against one rival. differences: by column; a reason where there is none. mean: of the unweighted means
    over columns, None where a column has no value or there is only one. wilcoxon_p: over columns, NaN when there is
    nothing to test. verdicts: by column, where there is an interval. remarks: on the method, by data set."""

    rival: str
    differences: dict[str, Difference | str]
    mean: Difference | None
    wilcoxon_p: float
    wilcoxon_p_holm: float
    verdicts: dict[str, Verdict]
    remarks: tuple[str, ...] = ()

    def count(self, verdict: Verdict) -> int:
        return list(self.verdicts.values()).count(verdict)


@dataclass(frozen=True)
class Comparison:
    """A model against all its rivals by one metric."""

    model: str
    title: str
    columns: tuple[str, ...]
    rivals: tuple[Against, ...]
    percent: bool
    level: float

    def markdown(self) -> str:
        several = len(self.columns) > 1
        columns = [*self.columns, *([mean_name(self.columns)] if several else [])]
        heads = ["against", *columns, "win/tie/loss", "Wilcoxon p", "Holm"]
        rows = []
        for rival in self.rivals:
            shown = [*map(rival.differences.get, self.columns), *([rival.mean] if several else [])]
            texts = [one.text(self.percent) if isinstance(one, Difference) else "-" for one in shown]
            counts = "/".join(str(rival.count(verdict)) for verdict in VERDICTS)
            tests = [p_text(rival.wilcoxon_p), p_text(rival.wilcoxon_p_holm)]
            rows.append([markdown_text(rival.rival), *texts, counts, *tests])
        return markdown_page(self.title, heads, rows, self.notes())

    def notes(self) -> list[str]:
        found = [
            f"differences are {self.model} minus the other, on samples that both have; [{self.level:.0%} interval], "
            "a tie is an interval that holds zero"
        ]
        if len(self.columns) < 6:
            least = 2 ** (1 - len(self.columns))
            found.append(f"Wilcoxon over {len(self.columns)} columns cannot give a p below {least:.3g}")
        for rival in self.rivals:
            for column, one in rival.differences.items():
                if isinstance(one, str):
                    found.append(f"{rival.rival}, {column}: {one}")
                elif one.verdict() is None:
                    why = f"fewer than {FEWEST_GROUPS} groups (of the rarer class), equal in all resamples, or no value"
                    found.append(f"{rival.rival}, {column}: {why}: no verdict")
            found += [f"{rival.rival}, {remark}" for remark in rival.remarks]
        return found

    def json(self) -> str:
        rivals = plain_values([asdict(rival) for rival in self.rivals])
        return json.dumps({"model": self.model, "title": self.title, "rivals": rivals}, indent=1) + "\n"


def compare(
    folder: ResultFolder, model: str, question: Question, against: tuple[str, ...] = (), level: float | None = None
) -> Comparison:
    """Compare a model with its rivals (by default all other models) from stored predictions, with intervals at `level`
    (by default the suite's). Raises ConfigError for an unknown model, task, metric, head or share; CorruptStoreError if
    predictions are not of the same samples."""
    known = folder.plan.models
    rivals = against or tuple(name for name in known if name != model)
    for one in (model, *rivals):
        if one not in known:
            raise ConfigError(f"{folder.out} has no model {one!r}; it has {', '.join(known)}")
    if not rivals or model in rivals:
        raise ConfigError(f"name a model other than {model!r} to compare with; there are {', '.join(known)}")
    question, name, scoring = folder.asked(question)
    metric = scoring.metrics[name]
    level = level or folder.plan.suite.bootstrap.level
    found = [_against(folder, question, model, rival, lower_is_better=metric.lower, level=level) for rival in rivals]
    adjusted = holm([one.wilcoxon_p for one in found])
    head = f" {question.head}" if question.head else ""
    return Comparison(
        model=model,
        title=f"{model}: {question.task}{head}, {name}; protocol {scoring.protocol}; suite {folder.plan.suite.suite}",
        columns=tuple(dict.fromkeys(column for one in found for column in one.differences)),
        rivals=tuple(replace(one, wilcoxon_p_holm=p) for one, p in zip(found, adjusted, strict=True)),
        percent=metric.share,
        level=level,
    )


def _against(
    folder: ResultFolder, question: Question, model: str, rival: str, *, lower_is_better: bool, level: float
) -> Against:
    parts: dict[str, list[Pair | str]] = {}
    remarks: list[str] = []
    for spec in folder.datasets(question):
        for column, found in _columns(folder, question, spec, model, rival, remarks).items():
            parts.setdefault(column, []).append(found)
    joined = {column: _mean(found) for column, found in parts.items()}
    differences: dict[str, Difference | str] = {
        column: one if isinstance(one, str) else paired_difference(*one, level) for column, one in joined.items()
    }
    values = {column: one for column, one in differences.items() if isinstance(one, Difference)}
    verdicts = {column: one.verdict(lower_is_better) for column, one in values.items()}
    mean = _mean(list(joined.values())) if len(joined) > 1 else ""
    return Against(
        rival=rival,
        differences=differences,
        mean=None if isinstance(mean, str) else paired_difference(*mean, level),
        wilcoxon_p=signed_rank_p([one.value for one in values.values()]) if len(values) > 1 else math.nan,
        wilcoxon_p_holm=math.nan,
        verdicts={column: verdict for column, verdict in verdicts.items() if verdict is not None},
        remarks=tuple(remarks),
    )


def _columns(
    folder: ResultFolder, question: Question, spec: DatasetSpec, model: str, rival: str, remarks: list[str]
) -> dict[str, Pair | str]:
    """Both models in each column of a data set, averaged over draws of the labels, or why they cannot be compared."""
    answers = {name: folder.answers(question, spec.dataset, name) for name in (model, rival)}
    found = [one for one in answers.values() if not isinstance(one, str)]
    columns = folder.column_names(question, spec, found[0][0]).tolist() if found else [spec.dataset]
    failed = next((f"{name}: {one}" for name, one in answers.items() if isinstance(one, str)), "")
    if not failed and len({one.info.get("choices") for draws in found for one in draws}) > 1:
        try:
            found = folder.on_common_choices(question, spec.dataset, (model, rival))
        except MmkdError as error:
            failed = (
                f"not comparable: galleries or candidates differ, and they cannot be scored on common ones: {error}"
            )
        else:
            remarks.append(
                f"{spec.dataset}: both scored again, on the gallery or candidates that both have features of"
            )
    if failed:
        return dict.fromkeys(columns, failed)
    for name, draws in zip(answers, found, strict=True):
        warned = dict.fromkeys(text for one in draws for text in one.info.get("warnings", ()))
        remarks.extend(f"{spec.dataset}: {name}: {text}" for text in warned)
    scored = []
    for one, other in zip(*found, strict=True):
        if one.ids.tolist() != other.ids.tolist() or (one.y is not None and not np.array_equal(one.y, other.labels())):
            raise CorruptStoreError(f"{folder.out}: two models' predictions are of other samples; run the suite again")
        both = one.available & other.available
        scored.append([folder.replicates(question, spec, replace(half, available=both)) for half in (one, other)])
    halves = list(zip(*scored, strict=True))
    ours, theirs = ({c: averaged([draw[c] for draw in half], same_rows=True) for c in columns} for half in halves)
    return {column: (ours[column], theirs[column]) for column in columns}


def _mean(found: Sequence[Pair | str]) -> Pair | str:
    """Return both models averaged over data sets or columns; the first reason where one has none."""
    pairs: list[Pair] = []
    for one in found:
        if isinstance(one, str):
            return one
        pairs.append(one)
    ours, theirs = zip(*pairs, strict=True)
    return averaged(ours), averaged(theirs)


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: the mean over data sets, or the only one."""

    rival: str
    head: str
    answer: Answer
    difference: Difference | None
    datasets: int
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim with its comparisons. level: of each interval, after Bonferroni's correction for `comparisons`."""

    text: str
    answer: Answer
    metric: str
    percent: bool
    level: float
    comparisons: int
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.answer}: {self.text} (by {self.metric}, paired; {counted(self.comparisons, 'comparison')}, "
            f"{100 * self.level:.4g} % intervals)"
        ]
        scale, unit = (100, " points") if self.percent else (1, "")
        for one in self.parts:
            what = f"  against {one.rival}{f', {one.head}' if one.head else ''}: "
            if one.difference is None or math.isnan(one.difference.value):
                lines.append(f"{what}{one.answer}: {one.reason}")
                continue
            value, low, high = (scale * getattr(one.difference, name) for name in ("value", "low", "high"))
            limits = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}], p = {one.difference.p:.3g}"
            over = f"n = {one.difference.n} in {counted(one.datasets, 'data set')}"
            why = f"; {one.reason}" if one.reason else ""
            lines.append(f"{what}{one.answer}: {value:+.2f}{unit}{limits}; {over}{why}")
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(plain_values(asdict(self) | {"parts": [asdict(one) for one in self.parts]}), indent=1)


def judge(folder: ResultFolder, text: str, metric: str | None = None, comparisons: int = 1) -> Claim:
    """Judge `A beats B on TASK` (B may be `all`, TASK may end with `/HEAD`) by the mean over data sets of the suite:
    yes where every interval lies above zero, no where one lies below, else cannot tell. `comparisons`: claims that were
    considered together; heads and rivals of this one count too. Raises ConfigError for anything else, an unknown model,
    task or metric."""
    found = re.fullmatch(r"\s*(\S+)\s+beats\s+(\S+)\s+on\s+([^\s/]+)(?:/(\S+))?\s*", text)
    if found is None:
        raise ConfigError(f"{text!r} is no claim; write `MODEL beats MODEL on TASK`, or `MODEL beats all on TASK`")
    model, rival, task, head = found.groups()
    questions = folder.questions(task, head, metric=metric, by="dataset")
    _, name, scoring = folder.asked(questions[0])
    rivals = tuple(one for one in folder.plan.models if one != model) if rival == EVERY else (rival,)
    count = comparisons * len(questions) * len(rivals)
    bootstrap = folder.plan.suite.bootstrap
    level = 1 - (1 - bootstrap.level) / count
    few = bootstrap.n * (1 - level) / 2 < FEWEST_BEYOND
    short = f"{bootstrap.n} resamples are too few for {counted(count, 'comparison')}; raise bootstrap n" if few else ""
    parts: list[Part] = []
    for question in questions:
        for one in compare(folder, model, question, rivals, level=level).rivals:
            difference = one.mean if len(one.differences) > 1 else next(iter(one.differences.values()))
            verdict, reason = None, short
            if not isinstance(difference, Difference):
                reasons = [f"{column}: {why}" for column, why in one.differences.items() if isinstance(why, str)]
                difference, reason = None, "; ".join(reasons) or "no value on one of the data sets"
            elif not short:
                verdict = difference.verdict(scoring.metrics[name].lower)
                reason = "" if verdict else "no interval: too few groups, or equal in all resamples"
            answer = ANSWERS.get(verdict, "cannot tell")
            parts.append(Part(one.rival, question.head or "", answer, difference, len(one.differences), reason))
    answers = {one.answer for one in parts}
    whole: Answer = "no" if "no" in answers else "yes" if answers == {"yes"} else "cannot tell"
    return Claim(text.strip(), whole, name, scoring.metrics[name].share, level, count, tuple(parts))
