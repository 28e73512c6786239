"""`A beats B on TASK`: yes, no, or cannot tell, from paired differences with intervals."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Literal

from mmkd.base.errors import ConfigError
from mmkd.base.text import counted, plain_values
from mmkd.evaluate.compare import compare
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.statistics import Difference

Answer = Literal["yes", "no", "cannot tell"]
EVERY = "all"
"""In place of a rival: every other model."""
FEWEST_BEYOND = 5
"""Resamples that must lie beyond a limit for it to be known."""


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
    _, measured, scoring = folder.asked(questions[0])
    rivals = tuple(name for name in folder.plan.models if name != model) if rival == EVERY else (rival,)
    count = comparisons * len(questions) * len(rivals)
    bootstrap = folder.plan.suite.bootstrap
    level = 1 - (1 - bootstrap.level) / count
    few = bootstrap.n * (1 - level) / 2 < FEWEST_BEYOND
    short = f"{bootstrap.n} resamples are too few for {counted(count, 'comparison')}; raise bootstrap n" if few else ""
    parts: list[Part] = []
    for question in questions:
        parts += _parts(folder, question, model, rivals, level, short, scoring.metrics[measured].lower)
    answers = {one.answer for one in parts}
    answer: Answer = "no" if "no" in answers else "yes" if answers == {"yes"} else "cannot tell"
    return Claim(text.strip(), answer, measured, scoring.metrics[measured].share, level, count, tuple(parts))


def _parts(
    folder: ResultFolder,
    question: Question,
    model: str,
    rivals: tuple[str, ...],
    level: float,
    short: str,
    lower_is_better: bool,
) -> list[Part]:
    parts = []
    for one in compare(folder, model, question, rivals, level=level).rivals:
        several = len(one.differences) > 1
        difference = one.mean if several else next(iter(one.differences.values()))
        reasons = [f"{name}: {text}" for name, text in one.differences.items() if isinstance(text, str)]
        if not isinstance(difference, Difference):
            reason = "; ".join(reasons) or "no value on one of the data sets"
            parts.append(Part(one.rival, question.head or "", "cannot tell", None, len(one.differences), reason))
            continue
        verdict = None if short else difference.verdict(lower_is_better)
        answer: Answer = "yes" if verdict == "win" else "no" if verdict == "loss" else "cannot tell"
        reason = short or ("no interval: too few groups, or equal in all resamples" if verdict is None else "")
        parts.append(Part(one.rival, question.head or "", answer, difference, len(one.differences), reason))
    return parts
