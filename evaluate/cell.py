"""Cells of tables: the value of one model in one column, or why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.scoring import Replicates


@dataclass(frozen=True)
class Cell:
    """One value, or why there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    """Samples behind the value."""
    missing: int = 0
    """Samples that the model has no features for."""
    seed_sd: float = math.nan
    """Standard deviation over draws of the labels, where several were made."""
    reason: str = ""
    """Why the value is undefined."""


Part = list[Replicates] | str
"""What one data set gives to one column: a value for each draw of the labels, or why there is none."""


@dataclass(frozen=True)
class Gathered:
    """Everything behind a table.

    columns: in order of appearance. parts: by (model, column), one for each data set of the column.
    """

    columns: list[str]
    parts: dict[tuple[str, str], list[Part]]

    def cell(self, model: str, columns: list[str], level: float) -> Cell:
        """The unweighted mean over columns, and over the data sets of a column, with its interval.

        One missing part leaves the whole cell without a value: a mean over fewer data sets is another number.
        """
        by_column = []
        for column in columns:
            joined = self.draws(model, column)
            if isinstance(joined, str):
                return Cell(math.nan, reason=joined if len(columns) == 1 else f"no value in {column}")
            by_column.append(joined)
        draws = [averaged(list(same_draw)) for same_draw in zip(*by_column, strict=True)]
        whole = averaged(draws)
        if math.isnan(whole.value):
            return Cell(math.nan, n=draws[0].n, missing=draws[0].missing, reason="has no value on these labels")
        low, high = whole.interval(level)
        spread = float(np.std([draw.value for draw in draws], ddof=1)) if len(draws) > 1 else math.nan
        return Cell(whole.value, low, high, draws[0].n, draws[0].missing, spread)

    def draws(self, model: str, column: str) -> Part:
        """Each draw of the labels, averaged over the data sets of a column."""
        parts = self.parts[model, column]
        for part in parts:
            if isinstance(part, str):
                return part
        return [averaged(list(same_draw)) for same_draw in zip(*parts, strict=True)]


def gather(folder: ResultFolder, question: Question) -> Gathered:
    """Score every model on every column. A failed unit leaves its reason in each column of its data set."""
    gathered = Gathered([], {})
    for spec in folder.datasets(question):
        found = {model: folder.answers(question, spec.dataset, model) for model in folder.plan.models}
        names: dict[str, None] = {}
        for answers in found.values():
            if not isinstance(answers, str):
                names |= dict.fromkeys(folder.column_names(question, spec, answers[0]).tolist())
        own = list(names) or [spec.modality if question.by == "modality" else spec.dataset]
        gathered.columns.extend(name for name in own if name not in gathered.columns)
        for model, answers in found.items():
            scored = [] if isinstance(answers, str) else [folder.replicates(question, spec, one) for one in answers]
            for column in own:
                part: Part = answers if isinstance(answers, str) else [draw[column] for draw in scored]
                gathered.parts.setdefault((model, column), []).append(part)
    return gathered


def averaged(parts: list[Replicates]) -> Replicates:
    """The unweighted mean of values of one metric, resample by resample.

    Parts of one data set share resamples, so what they have in common stays in the interval; parts of
    different data sets were drawn independently.
    """
    return Replicates(
        value=float(np.mean([part.value for part in parts])),
        draws=np.mean([part.draws for part in parts], axis=0),
        n=sum(part.n for part in parts),
        groups=sum(part.groups for part in parts),
        missing=sum(part.missing for part in parts),
    )
