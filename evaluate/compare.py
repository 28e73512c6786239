"""One model against each other: paired on the same samples, never an average of unlike metrics."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mmkd.base.errors import ConfigError, CorruptStoreError
from mmkd.base.text import plain_values
from mmkd.evaluate.cell import averaged
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import Replicates
from mmkd.evaluate.statistics import Difference, Verdict, holm, paired_difference, signed_rank_p


@dataclass(frozen=True)
class Against:
    """A model against one rival. differences: by column; a reason where there is none."""

    rival: str
    differences: dict[str, Difference | str]
    mean: Difference | None
    """Of the unweighted mean over columns; None where a column has no value, or there is only one."""
    wilcoxon_p: float
    """Over columns; NaN when there is nothing to test."""
    wilcoxon_p_holm: float
    """The same, adjusted for all rivals of the comparison."""
    verdicts: dict[str, Verdict]

    def count(self, verdict: Verdict) -> int:
        """Columns with this verdict."""
        return Counter(self.verdicts.values())[verdict]


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
        """A table with one line for each rival, and the notes that it needs to be read rightly."""
        heads = [*self.columns, *(["mean"] if len(self.columns) > 1 else [])]
        lines = [self.title, ""]
        lines.append("| " + " | ".join(["against", *heads, "win/tie/loss", "Wilcoxon p", "Holm"]) + " |")
        lines.append("|---|" + "---:|" * (len(heads) + 3))
        for rival in self.rivals:
            shown = [self._text(rival.differences.get(column)) for column in self.columns]
            shown += [self._text(rival.mean)] if len(self.columns) > 1 else []
            counts = "/".join(str(rival.count(verdict)) for verdict in ("win", "tie", "loss"))
            tests = [p_text(rival.wilcoxon_p), p_text(rival.wilcoxon_p_holm)]
            lines.append("| " + " | ".join([rival.rival, *shown, counts, *tests]) + " |")
        lines += ["", *(f"- {note}" for note in self.notes())]
        return "\n".join(lines) + "\n"

    def notes(self) -> list[str]:
        """How to read it, and what is missing."""
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
        return found

    def json(self) -> str:
        """The same as JSON; what has no value is null."""
        rivals = plain_values([asdict(rival) for rival in self.rivals])
        return json.dumps({"model": self.model, "title": self.title, "rivals": rivals}, indent=1) + "\n"

    def _text(self, difference: Difference | str | None) -> str:
        if difference is None or isinstance(difference, str) or math.isnan(difference.value):
            return "-"
        scale = 100 if self.percent else 1
        low, high = difference.low * scale, difference.high * scale
        return f"{difference.value * scale:+.1f} [{low:+.1f}, {high:+.1f}]"


def compare(folder: ResultFolder, model: str, question: Question, against: tuple[str, ...] = ()) -> Comparison:
    """Compare a model with its rivals from stored predictions.

    Args:
        folder: that `run_suite` filled.
        model: usually the student.
        question: task, metric, head, share of labels, and what the columns are.
        against: rivals; by default all other models.

    Raises:
        ConfigError: no such model, task, metric, head or share.
        CorruptStoreError: two models' predictions are not of the same samples.
    """
    known = folder.plan.models
    rivals = against or tuple(name for name in known if name != model)
    for name in (model, *rivals):
        if name not in known:
            raise ConfigError(f"{folder.out} has no model {name!r}; it has {', '.join(known)}")
    if not rivals or model in rivals:
        raise ConfigError(f"name a model other than {model!r} to compare with; there are {', '.join(known)}")
    scoring, metric = folder.scoring(question)
    lower = metric in scoring.lower_is_better
    found = [_against(folder, question, (model, rival), lower) for rival in rivals]
    for_all = holm([one.wilcoxon_p for one in found])
    head = f" {question.head}" if question.head else ""
    return Comparison(
        model=model,
        title=f"{model}: {question.task}{head}, {metric}; protocol {scoring.protocol}; suite {folder.plan.suite.suite}",
        columns=tuple(dict.fromkeys(column for one in found for column in one.differences)),
        rivals=tuple(replace(one, wilcoxon_p_holm=p) for one, p in zip(found, for_all, strict=True)),
        percent=metric not in scoring.not_shares,
        level=folder.plan.suite.bootstrap.level,
    )


def _against(folder: ResultFolder, question: Question, names: tuple[str, str], lower_is_better: bool) -> Against:
    level = folder.plan.suite.bootstrap.level
    parts: dict[str, list[tuple[Replicates, Replicates] | str]] = {}
    for spec in folder.datasets(question):
        one, other = (folder.answers(question, spec.dataset, name) for name in names)
        if isinstance(one, str) or isinstance(other, str):
            reason = f"{names[0]}: {one}" if isinstance(one, str) else f"{names[1]}: {other}"
            for column in _columns(folder, question, spec, (one, other)):
                parts.setdefault(column, []).append(reason)
            continue
        paired = [_on_common(a, b, folder.out) for a, b in zip(one, other, strict=True)]
        draws = [[folder.replicates(question, spec, half) for half in pair] for pair in paired]
        for column in _columns(folder, question, spec, (one, other)):
            ours, theirs = averaged([a[column] for a, _ in draws]), averaged([b[column] for _, b in draws])
            parts.setdefault(column, []).append((ours, theirs))
    joined = {column: _joined(found) for column, found in parts.items()}
    differences: dict[str, Difference | str] = {
        column: one if isinstance(one, str) else paired_difference(*one, level) for column, one in joined.items()
    }
    there = [one for one in joined.values() if not isinstance(one, str)]
    complete = len(there) == len(joined) > 1
    values = {column: one for column, one in differences.items() if not isinstance(one, str)}
    return Against(
        rival=names[1],
        differences=differences,
        mean=_mean_difference(there, level) if complete else None,
        wilcoxon_p=signed_rank_p([one.value for one in values.values()]) if len(values) > 1 else math.nan,
        wilcoxon_p_holm=math.nan,
        verdicts={column: one.verdict(lower_is_better) for column, one in values.items()},
    )


def _mean_difference(pairs: list[tuple[Replicates, Replicates]], level: float) -> Difference:
    """Difference of the unweighted means over columns."""
    return paired_difference(averaged([a for a, _ in pairs]), averaged([b for _, b in pairs]), level)


def _columns(
    folder: ResultFolder, question: Question, spec: DatasetSpec, answers: tuple[list[Predictions] | str, ...]
) -> list[str]:
    """The columns of a data set, from the first model that has answers; its name when none has."""
    for found in answers:
        if not isinstance(found, str):
            return list(dict.fromkeys(folder.column_names(question, spec, found[0]).tolist()))
    return [spec.dataset]


def _joined(found: list[tuple[Replicates, Replicates] | str]) -> tuple[Replicates, Replicates] | str:
    """Both models averaged over the data sets of a column."""
    for one in found:
        if isinstance(one, str):
            return one
    pairs = [one for one in found if not isinstance(one, str)]
    return averaged([a for a, _ in pairs]), averaged([b for _, b in pairs])


def _on_common(one: Predictions, other: Predictions, out: Path) -> tuple[Predictions, Predictions]:
    """Both predictions with only those samples available that both have, checked by key."""
    if one.ids.tolist() != other.ids.tolist() or (one.y is not None and not np.array_equal(one.y, other.labels())):
        raise CorruptStoreError(f"{out}: two models' predictions are not of the same samples; run the suite again")
    both = one.available & other.available
    return replace(one, available=both), replace(other, available=both)


def p_text(value: float) -> str:
    """A p-value to three digits, `-` where there is none."""
    return "-" if math.isnan(value) else f"{value:.3g}"
