"""What a task is: it predicts for one unit, and names the metrics that its predictions are scored by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.resampling import clustered_resamples
from mmkd.evaluate.settings import BootstrapSettings, TaskSettings
from mmkd.store.layout import Tower

Metric = Callable[[Predictions, Floats], Floats]
"""Predictions of n available rows and counts (B, n) to values (B,); NaN where undefined."""
Resampler = Callable[[Predictions, BootstrapSettings, str], Iterator[Floats]]


@dataclass(frozen=True)
class Variant:
    """One way of running a task on a data set."""

    head: str = ""
    """Direction, kind of head and the like; empty where a task has only one."""
    fraction: float = 1.0
    """Share of the labels used."""
    seed: int = 0
    """Draw of that share."""


@dataclass(frozen=True)
class Unit:
    """One thing to run: a model on a task of a data set, in one variant."""

    dataset: str
    task: str
    model: str
    variant: Variant = Variant()

    def __str__(self) -> str:
        parts = [self.dataset, self.task, self.model, self.variant.head]
        if self.variant.fraction < 1:
            parts.append(f"{self.variant.fraction:g} of labels")
        if self.variant.fraction < 1 or self.variant.seed:
            parts.append(f"draw {self.variant.seed}")
        return " / ".join(part for part in parts if part)


@dataclass(frozen=True)
class Scoring:
    """How predictions become numbers."""

    protocol: str
    metrics: dict[str, Metric]
    primary: str
    resamples: Resampler = clustered_resamples
    lower_is_better: frozenset[str] = frozenset()
    not_shares: frozenset[str] = frozenset()
    """Metrics that tables print as they are; all others are shares of one, printed in percent."""
    proportions: frozenset[str] = frozenset()
    """Metrics that are a mean over samples; at 0 and 100 % their interval is Wilson's."""
    rows: Mapping[str, Callable[[Predictions], NDArray[np.bool_]]] = field(default_factory=dict)
    """For a metric of some of the rows: which, bool (n,)."""


class Task(Protocol):
    """One kind of evaluation. Nothing outside its module and the table of tasks knows its name."""

    name: str
    version: int
    """Raise it when the same inputs give other predictions: stored results are then redone."""

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """Which features of the splits' rows it reads; prompts and candidates are texts in any case."""
        ...

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """The variants that these settings ask for, in the order of the tables."""
        ...

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Metrics, primary metric and resampling of these settings.

        Raises:
            ConfigError: the settings name a primary metric that does not exist.
        """
        ...

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """What keeps the task from running on this data set, one line each; features are not looked at."""
        ...

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Answer every test sample.

        Raises:
            MmkdError, ValueError: the unit cannot be run; the message is the reason.
        """
        ...
