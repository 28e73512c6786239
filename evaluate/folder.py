"""An output folder, read for tables and comparisons: which stored predictions answer which question."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmkd.base.arrays import Bools, Objects
from mmkd.base.errors import ConfigError, UserError
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.plan import Loaded, Plan, read_plan
from mmkd.evaluate.predictions import Predictions, read_predictions
from mmkd.evaluate.results import ResultRow, read_results
from mmkd.evaluate.scoring import Scoring
from mmkd.evaluate.statistics import Replicates, resampled
from mmkd.evaluate.task import Unit
from mmkd.evaluate.tasks import TASKS

By = Literal["domain", "dataset", "modality"]


@dataclass(frozen=True)
class Question:
    """One metric of one task (by default its primary one), in one head (by default its first), at one share of labels;
    by: what the columns are, `domain` divides data sets by their domain column."""

    task: str
    metric: str | None = None
    head: str | None = None
    fraction: float = 1.0
    by: By = "domain"


class ResultFolder:
    """One suite's results in an output folder of `run_suite`. Raises ConfigError as `read_plan`, CorruptStoreError as
    `read_results`."""

    def __init__(self, out: Path, suite: str | None = None) -> None:
        self.out = out
        self.plan: Plan = read_plan(out, suite)
        self.results: dict[str, list[ResultRow]] = read_results(out)
        self._read: dict[str, Predictions] = {}
        self._scored: dict[tuple[int, bytes, str, By], dict[str, Replicates]] = {}
        self._loaded = Loaded(self.plan)

    def questions(self, task: str | None, head: str | None, **rest: Any) -> list[Question]:
        """Return one question for each task and head, or for those that are named."""
        asked = dict.fromkeys((unit.task, unit.head) for unit in self.plan.units)
        chosen = [(t, h) for t, h in asked if task in (None, t) and head in (None, h)]
        return [Question(task=t, head=h, **rest) for t, h in chosen] or [Question(task=task or "", head=head, **rest)]

    def datasets(self, question: Question) -> list[DatasetSpec]:
        """Return the data sets with this task, and the metric if one is named, that have a store. Monitor sets are left
        out beside report sets: their scores were used during development. Raises ConfigError if the suite has none."""
        run: list[DatasetSpec] = [spec for spec in self.plan.suite.datasets if spec.dataset not in self.plan.absent]
        every = [spec for spec in run if question.task in spec.tasks]
        if not every:
            known = sorted({task for spec in run for task in spec.tasks})
            raise ConfigError(f"{self.out} has no task {question.task!r}; it has {', '.join(known)}")
        chosen = [spec for spec in every if spec.role == "report"] or every
        if question.metric is None:
            return chosen
        scored = [spec for spec in chosen if question.metric in TASKS[question.task].scoring(spec).metrics]
        if not scored:
            metrics = ", ".join(self.metrics(question))
            raise ConfigError(f"{question.task} has no metric {question.metric!r}; it has {metrics}")
        return scored

    def metrics(self, question: Question) -> list[str]:
        """Return the metrics that any data set with this task has."""
        specs = self.datasets(replace(question, metric=None))
        return list(dict.fromkeys(name for spec in specs for name in TASKS[question.task].scoring(spec).metrics))

    def asked(self, question: Question) -> tuple[Question, str, Scoring]:
        """Return the question with its metric named, by default the first primary one that all data sets have, if there
        is one; that metric; and the scoring. Raises ConfigError for an unknown metric, or data sets of different
        protocols."""
        found = [TASKS[question.task].scoring(spec) for spec in self.datasets(question)]
        shared = (one.primary for one in found if all(one.primary in other.metrics for other in found))
        metric = question.metric or next(shared, found[0].primary)
        question = replace(question, metric=metric)
        found = [TASKS[question.task].scoring(spec) for spec in self.datasets(question)]
        protocols = sorted({scoring.protocol for scoring in found})
        if len(protocols) > 1:
            raise ConfigError(
                f"{question.task} was run by {' and '.join(protocols)}: their values cannot share a table; "
                "give the data sets one protocol"
            )
        return question, metric, found[0]

    def units(self, question: Question, dataset: str, model: str) -> list[Unit]:
        """Return one unit per draw of the labels. Raises ConfigError for an unknown head or share of labels."""
        same = [u for u in self.plan.units if (u.dataset, u.task, u.model) == (dataset, question.task, model)]
        heads = list(dict.fromkeys(unit.head for unit in same))
        head = question.head if question.head is not None else next(iter(heads), "")
        shares = sorted({unit.fraction for unit in same})
        if same and (head not in heads or question.fraction not in shares):
            raise ConfigError(
                f"{question.task} on {dataset} has no head {head!r} at {question.fraction:g} of the labels; "
                f"heads: {', '.join(heads) or 'one'}; shares: {', '.join(f'{share:g}' for share in shares)}"
            )
        return [unit for unit in same if unit.head == head and unit.fraction == question.fraction]

    def predictions(self, unit: Unit) -> Predictions | str:
        """Return a unit's predictions, or the reason it has none."""
        rows = self.results.get(unit.key)
        if not rows:
            return "not run"
        if rows[0].status == "failed":
            return rows[0].reason
        if unit.key not in self._read:
            self._read[unit.key] = read_predictions(self.out / unit.file)
        return self._read[unit.key]

    def answers(self, question: Question, dataset: str, model: str) -> list[Predictions] | str:
        """Return one set of predictions per draw of the labels, or the reason there are none."""
        found = []
        for unit in self.units(question, dataset, model):
            one = self.predictions(unit)
            if isinstance(one, str):
                return one
            found.append(one)
        return found or "not run"

    def replicates(self, question: Question, spec: DatasetSpec, found: Predictions) -> dict[str, Replicates]:
        """Return the metric of a question on every column that a data set has rows of."""
        names = self.column_names(question, spec, found)
        parts = {name: names == name for name in dict.fromkeys(names.tolist())}
        if not any(found.score is one.score for one in self._read.values()):  # predicted anew for one comparison
            return self.scored(question, spec, found, parts)
        # The same for each rival that has features of the same rows.
        key = (id(found.score), found.available.tobytes(), self.asked(question)[1], question.by)
        if key not in self._scored:
            self._scored[key] = self.scored(question, spec, found, parts)
        return self._scored[key]

    def scored(
        self, question: Question, spec: DatasetSpec, found: Predictions, parts: Mapping[str, Bools]
    ) -> dict[str, Replicates]:
        """Return the metric of a question on parts of the rows, bool (n,) each."""
        (_, metric, _), scoring = self.asked(question), TASKS[question.task].scoring(spec)
        suite, name = self.plan.suite, self.plan.suite.resample_name(spec.dataset)
        scored = resampled(found, [metric], scoring, bootstrap=suite.bootstrap, name=name, parts=parts)
        return {part: replicates for (part, _), replicates in scored.items()}

    def on_common_choices(self, question: Question, dataset: str, models: tuple[str, str]) -> list[list[Predictions]]:
        """Predict again for both models, with only those gallery items and candidates that both have. Raises MmkdError
        if the store is gone, or it or the data set is not what it was when the suite was run."""
        data, features = self._loaded.rows_of(dataset), [self._loaded.features_of(dataset, one) for one in models]
        found = []
        for model, own, other in zip(models, features, features[::-1], strict=True):
            units = self.units(question, dataset, model)
            digests = {(unit.data_digest, unit.features_digest) for unit in units}
            if digests != {(data.digest, own.digest(data.rows_used))}:
                raise UserError(f"{data.store.root} has changed since; run the suite again")
            limited = Features(own.store, model, own.members, beside=(other,))
            found.append([TASKS[question.task].predict(unit.variant, data, limited) for unit in units])
        return found

    @staticmethod
    def column_names(question: Question, spec: DatasetSpec, found: Predictions) -> Objects:
        """Column that every row of a data set belongs to, str (n,)."""
        if question.by == "domain":
            return found.domain
        return np.full(len(found), spec.dataset if question.by == "dataset" else spec.modality, dtype=object)
