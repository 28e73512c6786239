"""Zero-shot classification with several labels per sample: every label for itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import expit

from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.multilabel import label_counts, label_problems, multilabel_needs, multilabel_scoring, predictions
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.task import Scoring, Task, TaskSettings, Variant
from mmkd.evaluate.zero_shot import class_cosines, prompt_facts
from mmkd.store import UserError


class MultilabelZeroShotSettings(TaskSettings):
    """Zero-shot classification with several labels per sample: every label for itself."""

    temperature: float = Field(default=100.0, gt=0)
    """Factor on the difference of positive and negative cosine before the logistic function, as in `zero_shot`.
    Without negative prompts the score is the bare cosine; the metrics look at the order within a label only."""


class MultilabelZeroShot(Task[MultilabelZeroShotSettings]):
    """Return presence against absence with negative prompts, else the cosine to the label's prompts. The pair of a
    positive and a negative prompt with a softmax over both is CheXzero's (Tiu et al. 2022). An ensemble averages its
    members' scores."""

    name = "multilabel_zero_shot"
    version = 2
    settings = MultilabelZeroShotSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        """Yield several labels and prompts."""
        yield from multilabel_needs(self.name, spec)
        if spec.prompts is None:
            yield f"{self.name} needs `prompts`"

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Return means over labels of the areas under the ROC curve and of the average precision."""
        return multilabel_scoring()

    def problems(self, data: DatasetRows) -> list[str]:
        """Every label needs positives, negatives and prompts."""
        found = label_problems(data, ("test",))
        try:
            data.prompt_labels()
            if data.negatives is not None:
                data.prompt_labels(negative=True)
        except UserError as error:
            found.append(str(error))
        return found

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        """Return positive, negative and unknown test samples of every label."""
        return label_counts(data, ("test",))

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return a score for every label of every test image."""
        scale = self.own(data.spec).temperature
        members = [_scores(data, member, scale) for member in features.each_member()]
        score = np.mean([found for found, _ in members], axis=0)
        available = np.logical_and.reduce([there for _, there in members])
        kind = "bare cosine" if data.negatives is None else "positive against negative prompts"
        return predictions(
            data, score, available, {"score": kind, "temperature": scale, **prompt_facts(data, features)}
        )


def _scores(data: DatasetRows, model: Features, scale: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the scores of one encoder, float64 (n, L), and which images it has."""
    positive, available = class_cosines(data, model)
    if data.negatives is None:
        return positive, available
    negative, _ = class_cosines(data, model, negative=True)
    # The softmax over two is the logistic function of their difference.
    return np.asarray(expit(scale * (positive - negative))), available


TASK = MultilabelZeroShot()
