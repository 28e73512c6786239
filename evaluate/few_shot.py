"""Few-shot classification without training: nearest class mean and nearest neighbors of a few samples of each class."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from mmkd.base.arrays import Bools, Floats, Ints, Singles
from mmkd.base.errors import UserError
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Block, Features
from mmkd.evaluate.metrics import mean_of_defined, weighted_mean
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.retrieval import TIE
from mmkd.evaluate.scoring import Metric, Scoring, class_contrasts
from mmkd.evaluate.splits import group_leaks
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_test, without_features

ELEMENTS = 1 << 22
"""Cosines held at a time: 16 MiB of float32."""
Vote = Callable[[Singles, Singles, Bools], Singles]
"""Cosines (C, shots, n), samples (C, shots, D) and which have features (C, shots) to scores (C, n)."""


class FewShotSettings(TaskSettings):
    """Classification by a few labeled samples of each class."""

    heads: tuple[Literal["ncm", "knn"], ...] = ("ncm", "knn")
    """Nearest class mean (Snell et al. 2017; Wang et al. 2019, SimpleShot), k nearest neighbors."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Training samples of each class, drawn without replacement."""
    draws: int = Field(default=1000, ge=1)
    seed: int = Field(default=42, ge=0)
    neighbors: int = Field(default=5, ge=1)
    """k of `knn`; with fewer shots, as many as there are."""

    @field_validator("shots")
    @classmethod
    def _shots_are_counts(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if not shots or min(shots) < 1 or len(set(shots)) < len(shots):
            raise ValueError(f"shots must be different numbers from 1, got {list(shots)}")
        return tuple(sorted(shots))


class FewShot(Task[FewShotSettings]):
    """How often each test image is classified rightly over many draws, which all models share. An ensemble joins its
    members' features."""

    name = "few_shot"
    settings = FewShotSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        if spec.label is None or spec.rows.train is None:
            yield "few_shot needs a `label` column and `rows: train`"

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        return tuple(Variant(head=head) for head in self.own(spec).heads)

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Mean over draws of accuracy and balanced accuracy, both means over samples, at each number of shots."""
        own = self.own(spec)
        metrics = {f"bacc@{k}": Metric(partial(_recall, shots=k)) for k in own.shots}
        metrics |= {f"acc@{k}": Metric(partial(_accuracy, shots=k)) for k in own.shots}
        return Scoring("standard", metrics, f"bacc@{own.shots[-1]}", contrasts=class_contrasts)

    def problems(self, data: DatasetRows) -> list[str]:
        found = data.class_problems(("train", "test")) + group_leaks(data, ("train", "test"))
        return found + ([] if found else _too_many_shots(data, self.own(data.spec)))

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return the share of draws in which each test image is classified rightly, float64 (n, shots)."""
        own, samples = self.own(data.spec), data.split("train")
        for problem in group_leaks(data, ("train", "test")) + _too_many_shots(data, own):
            raise UserError(problem)
        train, test = features.images(samples.rows), features.images(data.split("test").rows)
        y, labels = data.labels(data.split("test")), data.labels(samples)
        score, there = np.full((len(y), len(own.shots)), np.nan), test.available
        spread: dict[str, float] = {}
        for column, k in enumerate(own.shots):
            draws = draw_shots(labels, k, own.draws, own.seed)
            vote = nearest_means if variant.head == "ncm" else partial(nearest_neighbors, k=min(own.neighbors, k))
            right, spread[str(k)] = shares_right(train, draws, test.values[there], y[there], vote)
            score[there, column] = right
        missing = without_features(int(train.available.sum()), len(samples), "train rows")
        info = {"draws": own.draws, "sd_of_draws": spread, "warnings": missing}
        columns = tuple(f"right@{k}" for k in own.shots)
        return answers_of_test(data, score, test.available, columns, info=info, labeled=True)


def draw_shots(labels: Ints, shots: int, draws: int, seed: int) -> Ints:
    """Return positions of samples, int64 (draws, C, shots), without replacement within a draw. They depend on the
    labels and the seed alone, and so are the same for all models."""
    rng = np.random.default_rng([seed, shots])
    classes = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    return np.stack([np.stack([rng.permutation(members)[:shots] for members in classes]) for _ in range(draws)])


def shares_right(train: Block, draws: Ints, test: Singles, y: Ints, vote: Vote) -> tuple[Floats, float]:
    """Return the share of draws in which each test sample is classified rightly, float64 (n,), and the standard
    deviation of the accuracy over draws. A class that scores as high as the right one (within `TIE`) makes it wrong."""
    known = np.where(train.available[:, None], train.values, 0).astype(np.float32)
    share, hits, size = np.zeros(len(y)), np.zeros(len(draws)), max(1, ELEMENTS // len(known))
    for start in range(0, len(y), size):
        part = slice(start, start + size)
        cosines, own = known @ test[part].T, y[part]
        rows = np.arange(len(own))
        for i, draw in enumerate(draws):
            score = vote(cosines[draw], known[draw], train.available[draw])
            mine = score[own, rows]
            score[own, rows] = -np.inf
            right = mine > score.max(axis=0) + TIE
            share[part] += right
            hits[i] += right.sum()
    return share / len(draws), float((hits / max(1, len(y))).std(ddof=1)) if len(draws) > 1 else 0.0


def nearest_means(cosines: Singles, support: Singles, there: Bools) -> Singles:
    """Return cosines of test samples to the class means, float32 (C, n), from `cosines` to their samples, float32 (C,
    shots, n). `support`: float32 (C, shots, D), zeros where not `there`, bool (C, shots)."""
    length = np.linalg.norm(support.sum(axis=1), axis=1)
    means = cosines.sum(axis=1) / np.maximum(length, np.finfo(np.float32).tiny)[:, None]
    return np.where(length[:, None] > 0, means, -np.inf)


def nearest_neighbors(cosines: Singles, support: Singles, there: Bools, *, k: int) -> Singles:
    """Return the votes of the k nearest samples (and of those as near as the last) for each class, float32 (C, n); of
    classes with equal votes the one with the nearest sample is ahead. Arguments as in `nearest_means`."""
    known = np.where(there[:, :, None], cosines, -2)
    flat = known.reshape(-1, known.shape[2])
    last = np.partition(flat, len(flat) - k, axis=0)[len(flat) - k]
    votes: Singles = ((known >= last - TIE).sum(axis=1) + known.max(axis=1) / 4).astype(np.float32)
    return votes


def _too_many_shots(data: DatasetRows, own: FewShotSettings) -> list[str]:
    counts = np.bincount(data.labels(data.split("train")), minlength=len(data.classes))
    least = int(counts.argmin())
    if own.shots[-1] <= counts[least]:
        return []
    return [
        f"{data.spec.dataset}: {own.shots[-1]} shots are more than the {counts[least]} train rows of class "
        f"{data.classes[least]!r}, the smallest; give `settings: {{few_shot: {{shots: [...]}}}}` up to that"
    ]


def _accuracy(found: Predictions, weights: Floats, shots: int) -> Floats:
    return weighted_mean(found.column(f"right@{shots}"), weights)


def _recall(found: Predictions, weights: Floats, shots: int) -> Floats:
    right, y = found.column(f"right@{shots}"), found.labels()
    recalls = [weighted_mean(right[y == c], weights[:, y == c]) for c in np.unique(y)]
    return mean_of_defined(np.stack(recalls, axis=1))
