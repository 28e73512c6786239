"""One model against each other: paired on the same samples, never an average of unlike metrics."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mmkd.base.errors import ConfigError, CorruptStoreError, MmkdError
from mmkd.base.text import plain_values
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

Paired = tuple[Replicates, Replicates]


@dataclass(frozen=True)
class Against:
    """A model against one rival. differences: by column; a reason where there is none."""

    rival: str
    differences: dict[str, Difference | str]
    mean: Difference | None
    """Comparison of the unweighted mean over columns; None where a column has no value, or there is only one."""
    wilcoxon_p: float
    """Over columns; NaN when there is nothing to test."""
    wilcoxon_p_holm: float
    """The same, adjusted for all rivals of the comparison."""
    verdicts: dict[str, Verdict]
    """By column, where there is an interval."""
    remarks: tuple[str, ...] = ()
    """Method of the comparison, by data set."""

    def count(self, verdict: Verdict) -> int:
        """Return columns with this verdict."""
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
        """Return a table with one line for each rival, and its notes."""
        columns = [*self.columns, *([mean_name(self.columns)] if len(self.columns) > 1 else [])]
        heads = ["against", *map(markdown_text, columns), "win/tie/loss", "Wilcoxon p", "Holm"]
        rows = []
        for rival in self.rivals:
            shown = [*map(rival.differences.get, self.columns), *([rival.mean] if len(self.columns) > 1 else [])]
            counts = "/".join(str(rival.count(verdict)) for verdict in VERDICTS)
            tests = [p_text(rival.wilcoxon_p), p_text(rival.wilcoxon_p_holm)]
            rows.append([markdown_text(rival.rival), *map(self._text, shown), counts, *tests])
        return markdown_page(self.title, heads, rows, self.notes())

    def notes(self) -> list[str]:
        """Return notes on reading the table and on missing values."""
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
                    why = f"fewer than {FEWEST_GROUPS} groups (of the rarer class), or no value"
                    found.append(f"{rival.rival}, {column}: {why}: no verdict")
            found += [f"{rival.rival}, {remark}" for remark in rival.remarks]
        return found

    def json(self) -> str:
        """Return the same as JSON; what has no value is null."""
        rivals = plain_values([asdict(rival) for rival in self.rivals])
        return json.dumps({"model": self.model, "title": self.title, "rivals": rivals}, indent=1) + "\n"

    def _text(self, difference: Difference | str | None) -> str:
        if difference is None or isinstance(difference, str) or math.isnan(difference.value):
            return "-"
        scale = 100 if self.percent else 1
        interval = f" [{difference.low * scale:+.1f}, {difference.high * scale:+.1f}]"
        return f"{difference.value * scale:+.1f}{'' if math.isnan(difference.low) else interval}"


def compare(folder: ResultFolder, model: str, question: Question, against: tuple[str, ...] = ()) -> Comparison:
    """Compare a model with its rivals from stored predictions. Raises ConfigError if there is no such model, task,
    metric, head or share. Raises CorruptStoreError if two models' predictions are not of the same samples.

    Args:
        folder: that `run_suite` filled.
        model: usually the student.
        question: task, metric, head, share of labels, and what the columns are.
        against: rivals; by default all other models.
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
    parts: dict[str, list[Paired | str]] = {}
    remarks: list[str] = []
    for spec in folder.datasets(question):
        for column, found in _columns(folder, question, spec, names, remarks).items():
            parts.setdefault(column, []).append(found)
    joined = {column: _averaged(found) for column, found in parts.items()}
    there = [one for one in joined.values() if not isinstance(one, str)]
    differences: dict[str, Difference | str] = {
        column: one if isinstance(one, str) else paired_difference(*one, level) for column, one in joined.items()
    }
    values = {column: one for column, one in differences.items() if not isinstance(one, str)}
    verdicts = {column: one.verdict(lower_is_better) for column, one in values.items()}
    mean = _averaged(there) if len(there) == len(joined) > 1 else ""
    return Against(
        rival=names[1],
        differences=differences,
        mean=None if isinstance(mean, str) else paired_difference(*mean, level),
        wilcoxon_p=signed_rank_p([one.value for one in values.values()]) if len(values) > 1 else math.nan,
        wilcoxon_p_holm=math.nan,
        verdicts={column: verdict for column, verdict in verdicts.items() if verdict is not None},
        remarks=tuple(remarks),
    )


def _columns(
    folder: ResultFolder, question: Question, spec: DatasetSpec, names: tuple[str, str], remarks: list[str]
) -> dict[str, Paired | str]:
    """Both models in each column of a data set, averaged over draws of the labels, or why they cannot be compared."""
    answers = [folder.answers(question, spec.dataset, name) for name in names]
    there = [one for one in answers if not isinstance(one, str)]
    columns = folder.column_names(question, spec, there[0][0]).tolist() if there else [spec.dataset]
    failed = next((f"{name}: {one}" for name, one in zip(names, answers, strict=True) if isinstance(one, str)), "")
    if not failed and len({one.info.get("choices") for draws in there for one in draws}) > 1:
        try:
            there = folder.on_common_choices(question, spec.dataset, names)
            remarks.append(
                f"{spec.dataset}: both scored again, on the gallery or candidates that both have features of"
            )
        except MmkdError as error:
            failed = (
                f"not comparable: galleries or candidates differ, and they cannot be scored on common ones: {error}"
            )
    if failed:
        return dict.fromkeys(columns, failed)
    for name, own in zip(names, there, strict=True):
        warned = dict.fromkeys(text for one in own for text in one.info.get("warnings", ()))
        remarks.extend(f"{spec.dataset}: {name}: {text}" for text in warned)
    draws: tuple[list[dict[str, Replicates]], list[dict[str, Replicates]]] = ([], [])
    for pair in zip(*there, strict=True):
        one, other = pair
        if one.ids.tolist() != other.ids.tolist() or (one.y is not None and not np.array_equal(one.y, other.labels())):
            raise CorruptStoreError(f"{folder.out}: two models' predictions are of other samples; run the suite again")
        for found, scored in zip(pair, draws, strict=True):
            common = replace(found, available=one.available & other.available)
            scored.append(folder.replicates(question, spec, common))
    ours, theirs = ({one: averaged([draw[one] for draw in half], same_rows=True) for one in columns} for half in draws)
    return {column: (ours[column], theirs[column]) for column in ours}


def _averaged(found: Sequence[Paired | str]) -> Paired | str:
    """Return both models averaged over data sets or columns; the first reason where one has none."""
    pairs = [one for one in found if not isinstance(one, str)]
    if len(pairs) < len(found):
        return next(one for one in found if isinstance(one, str))
    return averaged([a for a, _ in pairs]), averaged([b for _, b in pairs])
