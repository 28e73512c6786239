"""Interface of a task: it predicts for one unit, and names the metrics that score its predictions."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from mmkd.base.arrays import Bools, Floats, Ints
from mmkd.base.config import Frozen
from mmkd.base.errors import ConfigError
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec, Section
from mmkd.evaluate.features import Bags, Features
from mmkd.evaluate.measured import Answers, with_measures
from mmkd.evaluate.predictions import Predictions, Validation
from mmkd.evaluate.scoring import Scoring
from mmkd.evaluate.splits import subgroups_of
from mmkd.store.layout import Tower


@dataclass(frozen=True)
class Variant:
    """One way of running a task on a data set. fraction: share of the labels used. seed: draw of that share."""

    head: str = ""
    """Direction, kind of head and the like; empty where a task has only one."""
    fraction: float = 1.0
    seed: int = 0


class Unit(Frozen):
    """One thing to run: a model on a task of a data set, in one variant, with the identity of its result."""

    key: str
    dataset: str
    task: str
    model: str
    head: str
    fraction: float
    seed: int
    features_digest: str = ""
    data_digest: str = ""
    config_digest: str = ""
    reason: str = ""
    """Why it cannot run, or its metric has no value; else empty."""

    def __str__(self) -> str:
        parts = [self.dataset, self.task, self.model, self.head]
        if self.fraction < 1:
            parts.append(f"{self.fraction:g} of labels")
        if self.fraction < 1 or self.seed:
            parts.append(f"draw {self.seed}")
        return " / ".join(part for part in parts if part)

    @property
    def variant(self) -> Variant:
        return Variant(self.head, self.fraction, self.seed)

    @property
    def file(self) -> str:
        """Path of the per-sample file below the output folder. The key in it keeps old files from being overwritten."""
        variant = "".join(f"-{part}" for part in (self.head, f"{self.fraction:g}-{self.seed}") if part)
        return f"predictions/{self.dataset}/{self.task}/{self.model}{variant}.{self.key}.parquet"


class TaskSettings(Frozen):
    """Settings of a task, a model of its own for each; their defaults are argued for in the documentation."""

    primary: str | None = None
    """Metric that tables show when none is named; by default the protocol's own choice."""


Own = TypeVar("Own", bound=TaskSettings)


class Task(ABC, Generic[Own]):
    """One kind of evaluation. Nothing outside its module knows its name; the table of tasks names the module."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when the same inputs give other predictions: stored results are then computed again."""
    settings: type[Own]
    """Model of its settings; every field has a default."""
    answers: ClassVar[Answers] = ""
    """What its scores are, for the measures that a suite asks for."""
    section: ClassVar[type[Section] | None] = None
    """Model of the part of a description that only this task reads; the key is the task's name."""

    def own(self, spec: DatasetSpec) -> Own:
        """This task's settings on a data set."""
        found: Own = getattr(spec.settings, self.name)
        return found

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        """Yield what the description lacks for this task, without reading the store."""
        if self.section is not None and getattr(spec, self.name) is None:
            yield f"{self.name} needs `{self.name}`, the columns that it reads"

    def validates(self, spec: DatasetSpec) -> bool:
        """Whether predictions bring along probabilities of validation rows that nothing was fitted on."""
        return False

    def towers(self, spec: DatasetSpec) -> tuple[Tower, ...]:
        """Towers of the splits' rows that the task reads; prompts and candidates are texts in any case."""
        return ("image",)

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        """Variants that the settings ask for, in the order of the tables."""
        return (Variant(),)

    @abstractmethod
    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Metrics, resampling and the default of the primary metric."""

    def scoring(self, spec: DatasetSpec) -> Scoring:
        """Return the standard scoring with the measures of the data set and the primary metric of the settings. Raises
        ConfigError if there is no such metric."""
        standard, primary = self.standard_scoring(spec), self.own(spec).primary
        chosen = replace(standard, primary=primary if primary in standard.metrics else standard.primary)
        scoring = with_measures(chosen, spec, self.answers, validated=self.validates(spec))
        if primary is not None and primary not in scoring.metrics:
            known = ", ".join(scoring.metrics)
            raise ConfigError(f"protocol {scoring.protocol} has no metric {primary!r}; it has {known}")
        return replace(scoring, primary=primary or scoring.primary)

    def problems(self, data: DatasetRows) -> list[str]:
        """Reasons why the task cannot run on this data set, features aside. Raises UserError for one that ends the
        check."""
        return []

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        """Counts that a reviewer would ask for: title to value and count, such as `test events`. Raises UserError if
        the rows cannot be counted; `problems` says why."""
        return {}

    @abstractmethod
    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Answer every test sample. Raises MmkdError, ValueError with the reason if the unit cannot be run."""


def without_features(there: int, rows: int, what: str) -> list[str]:
    """Warn where some of the rows behind a score have no features: a model with all of them had more to go by."""
    return [f"{rows - there} of the {rows} {what} have no features"] if there < rows else []


def answers_of_bags(
    bags: Bags,
    score: Floats,
    available: Bools,
    columns: tuple[str, ...],
    *,
    info: dict[str, Any],
    fold: Ints,
    y: Ints | None = None,
) -> Predictions:
    """Return predictions for the bags that a fold tests, int64 (n,), -1 for none: score float64 (n, len(columns)),
    available bool (n,), y int64 (n,)."""
    found = Predictions(
        bags.ids, bags.groups, bags.domains, y, score, available & (fold >= 0), columns, info, fold,
        subgroups_of(bags.data, bags.column),
    )  # fmt: skip
    return found.take(fold >= 0)


def answers_of_test(
    data: DatasetRows,
    score: Floats,
    available: Bools,
    columns: tuple[str, ...],
    *,
    info: dict[str, Any],
    labeled: bool = False,
    validation: Validation | None = None,
) -> Predictions:
    """Return predictions for all test rows: score float64 (n, len(columns)), available bool (n,)."""
    test = data.split("test")
    y = data.labels(test) if labeled else None
    groups, domains, subgroups = data.groups(test), data.domains(test), subgroups_of(data, test.column)
    return Predictions(
        test.ids, groups, domains, y, score, available, columns, info, subgroups=subgroups, validation=validation
    )
