"""Zero-shot classification with several labels a sample: every label for itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from mmkd.evaluate.classification import scoring_with_primary
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.multilabel import label_problems, multilabel_scoring, predictions
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.settings import TaskSettings
from mmkd.evaluate.task import Scoring, Variant
from mmkd.evaluate.zero_shot import class_cosines
from mmkd.store import UserError
from mmkd.store.layout import Tower


class MultilabelZeroShot:
    """Presence against absence where there are negative prompts, else the cosine to the label's prompts.

    The pair of a positive and a negative prompt with a softmax over both is CheXzero's (Tiu et al. 2022). An
    ensemble averages its members' scores.
    """

    name = "multilabel_zero_shot"
    version = 1

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """Images."""
        return ("image",)

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """One: there is nothing to draw."""
        return (Variant(),)

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Means over labels of the areas under the ROC curve and of the average precision."""
        return scoring_with_primary(multilabel_scoring(), settings.multilabel_zero_shot.primary)

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """Every label needs positives, negatives and prompts."""
        found = label_problems(data, ("test",))
        try:
            data.prompt_labels()
            if data.negatives is not None:
                data.prompt_labels(negative=True)
        except UserError as error:
            found.append(str(error))
        return found

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """A score for every label of every test image."""
        scale = data.spec.settings.multilabel_zero_shot.temperature
        members = [_scores(data, member, scale) for member in features.each_member()]
        score = np.mean([found for found, _ in members], axis=0)
        available = np.logical_and.reduce([there for _, there in members])
        kind = "bare cosine" if data.negatives is None else "positive against negative prompts"
        return predictions(data, score, available, {"score": kind, "temperature": scale})


def _scores(data: DatasetRows, model: Features, scale: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Scores of one encoder, float64 (n, L), and which images it has."""
    positive, available = class_cosines(data, model)
    if data.negatives is None:
        return positive, available
    negative, _ = class_cosines(data, model, negative=True)
    # The softmax over two is the logistic function of their difference.
    return np.asarray(expit(scale * (positive - negative))), available
