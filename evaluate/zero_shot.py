"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from mmkd.evaluate import official
from mmkd.evaluate.classification import class_problems, scoring_with_primary, standard_metrics
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.settings import TaskSettings
from mmkd.evaluate.task import Scoring, Variant
from mmkd.store import UserError
from mmkd.store.layout import Tower


class ZeroShot:
    """Cosine to class vectors, softmax at a fixed temperature. An ensemble averages its members' probabilities."""

    name = "zero_shot"
    version = 2

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """Images."""
        return ("image",)

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """One: there is nothing to draw."""
        return (Variant(),)

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Metrics of the protocol; the primary one is the macro AUROC unless the settings say otherwise."""
        if settings.zero_shot.protocol == "mmkd_official":
            return scoring_with_primary(official.SCORING, settings.zero_shot.primary)
        standard = Scoring("standard", standard_metrics(), primary="auroc_macro", proportions=frozenset({"acc"}))
        return scoring_with_primary(standard, settings.zero_shot.primary)

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """Labels and prompts must name the same classes."""
        return class_problems(data, ("test",), prompts=True)

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Class probabilities, float64 (n, C), of every test image."""
        test = data.split("test")
        settings = data.spec.settings.zero_shot
        official_protocol = settings.protocol == "mmkd_official"
        scale = official.TEMPERATURE if official_protocol else settings.temperature
        members = [class_cosines(data, member) for member in features.each_member()]
        score = np.mean([softmax(cosines * scale, axis=1) for cosines, _ in members], axis=0)
        available = np.logical_and.reduce([there for _, there in members])
        score[~available] = np.nan
        prompts = data.prompt_labels()
        assert data.prompts is not None, "the suite requires prompts for this task"
        info: dict[str, Any] = {
            "temperature": scale,
            "protocol": settings.protocol,
            "prompts": np.bincount(prompts, minlength=len(data.classes)).tolist(),
            "choices": choices_digest(data.prompts.ids[features.texts(data.prompts.rows).available]),
        }
        return Predictions(
            ids=test.ids,
            group=data.groups(test),
            domain=data.domains(test),
            y=data.labels(test),
            score=score,
            available=available,
            columns=data.classes,
            info=info,
        )


def class_vectors(texts: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Mean of each class' unit prompt vectors, again of unit length: float32 (classes, D).

    Radford et al. 2021 (CLIP), section 3.1.4, ensembling in embedding space. The second normalisation
    matters: without it a class with prompts that agree would outscore one with prompts that differ.

    Args:
        texts: float32 (m, D), unit length.
        labels: int64 (m,), class of every prompt; each class occurs.
        classes: C.
    """
    sums = np.zeros((classes, texts.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, texts.astype(np.float64))
    return np.asarray(sums / np.linalg.norm(sums, axis=1, keepdims=True), dtype=np.float32)


def class_cosines(data: DatasetRows, model: Features, negative: bool = False) -> tuple[Floats, NDArray[np.bool_]]:
    """Cosines of test images and the class vectors of one encoder.

    Args:
        data: with prompts.
        model: one encoder.
        negative: take the prompts of the classes' absence.

    Returns:
        float64 (n, C), NaN for images without features; and which images have them, bool (n,).

    Raises:
        UserError: a class has no prompt that the encoder has features of.
    """
    prompts = data.negatives if negative else data.prompts
    assert prompts is not None, "the suite requires prompts for this task"
    images = model.images(data.split("test").rows)
    texts = model.texts(prompts.rows)
    labels = data.prompt_labels(negative)[texts.available]
    bare = sorted(set(range(len(data.classes))) - set(labels.tolist()))
    if bare:
        raise UserError(
            f"{model.model} has no text features for the {prompts.name}s of class {data.classes[bare[0]]!r}"
        )
    vectors = class_vectors(texts.values[texts.available], labels, len(data.classes))
    cosines = np.full((len(images.available), len(vectors)), np.nan)
    cosines[images.available] = images.values[images.available] @ vectors.T
    return cosines, images.available
