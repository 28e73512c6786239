"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import softmax

from mmkd.evaluate import official
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.task import (
    Scoring,
    Task,
    TaskSettings,
    Variant,
    answers_of_test,
    class_contrasts,
    class_problems,
    standard_metrics,
    without_features,
)
from mmkd.store import UserError


class ZeroShotSettings(TaskSettings):
    """Zero-shot classification by the nearest class text."""

    protocol: Literal["standard", "mmkd_official"] = "standard"
    """`mmkd_official` scores as the code released with MMKD-CLIP does, quirks included (see `official.py`)."""
    temperature: float = Field(default=100.0, gt=0)
    """Factor on the cosines before the softmax. One fixed value for all models: a model's own scale would make
    their macro AUROC incomparable. 100 is where CLIP clips its learned scale. The official protocol uses 1."""


class ZeroShot(Task[ZeroShotSettings]):
    """Cosine to class vectors, softmax at a fixed temperature. An ensemble averages its members' probabilities."""

    name = "zero_shot"
    version = 2
    settings = ZeroShotSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        """Yield labels and prompts; the official protocol needs an order of classes."""
        if spec.label is None:
            yield "zero_shot needs a `label` column"
        if spec.prompts is None:
            yield "zero_shot needs `prompts`"
        if self.own(spec).protocol == "mmkd_official" and spec.classes is None:
            yield "protocol mmkd_official needs `classes`: their order decides the F1"

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Return the metrics of the protocol."""
        if self.own(spec).protocol == "mmkd_official":
            return official.SCORING
        return Scoring(
            "standard",
            standard_metrics(),
            primary="auroc_macro",
            proportions=frozenset({"acc"}),
            contrasts=class_contrasts,
        )

    def problems(self, data: DatasetRows) -> list[str]:
        """Labels and prompts must name the same classes."""
        return class_problems(data, ("test",), prompts=True)

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return class probabilities, float64 (n, C), of every test image."""
        settings = self.own(data.spec)
        released = settings.protocol == "mmkd_official"
        scale = official.TEMPERATURE if released else settings.temperature
        members = [class_cosines(data, member) for member in features.each_member()]
        # The released code takes its softmax in float32, which ties cosines that nearly agree.
        kind = np.float32 if released else np.float64
        score = np.mean([softmax((cosines * scale).astype(kind), axis=1) for cosines, _ in members], axis=0)
        available = np.logical_and.reduce([there for _, there in members])
        score[~available] = np.nan
        assert data.prompts is not None, "the suite requires prompts for this task"
        info: dict[str, Any] = {
            "temperature": scale,
            "protocol": settings.protocol,
            "prompts": np.bincount(data.prompt_labels(), minlength=len(data.classes)).tolist(),
            **prompt_facts(data, features),
        }
        return answers_of_test(data, score.astype(np.float64), available, data.classes, info=info, labelled=True)


def prompt_facts(data: DatasetRows, features: Features) -> dict[str, Any]:
    """Return the digest of the prompts that the model has features of, and a warning where it lacks some."""
    ids, warnings = [], []
    for prompts in (one for one in (data.prompts, data.negatives) if one is not None):
        there = features.texts(prompts.rows).available
        ids.extend(prompts.ids[there].tolist())
        warnings += without_features(int(there.sum()), len(prompts), f"{prompts.name}s")
    return {"choices": choices_digest(ids), "warnings": warnings}


def class_vectors(texts: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return the mean of each class' unit prompt vectors, again of unit length: float32 (classes, D). Radford et al.
    2021 (CLIP), section 3.1.4, ensembling in embedding space. The second normalization matters: without it a class with
    prompts that agree would outscore one with prompts that differ. `texts`: float32 (m, D), unit length. `labels`:
    int64 (m,), class of every prompt; each class occurs. `classes`: C."""
    sums = np.zeros((classes, texts.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, texts.astype(np.float64))
    return np.asarray(sums / np.linalg.norm(sums, axis=1, keepdims=True), dtype=np.float32)


def class_cosines(data: DatasetRows, model: Features, negative: bool = False) -> tuple[Floats, NDArray[np.bool_]]:
    """Return cosines of test images and the class vectors of one encoder. Result: float64 (n, C), NaN for images
    without features; and which images have them, bool (n,). Raises UserError if a class has no prompt that the encoder
    has features of. `data`: with prompts. `model`: one encoder. `negative`: take the prompts of the classes'
    absence."""
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


TASK = ZeroShot()
