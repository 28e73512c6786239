"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy.special import softmax

from mmkd.base.arrays import Bools, Floats, Ints, Singles
from mmkd.evaluate import official
from mmkd.evaluate.dataset import DatasetRows, Split
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.predictions import Predictions, Validation, choices_digest
from mmkd.evaluate.scoring import STANDARD, Scoring
from mmkd.evaluate.splits import group_leaks
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_test, without_features
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
    answers = "classes"
    settings = ZeroShotSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        if spec.label is None:
            yield "zero_shot needs a `label` column"
        if spec.prompts is None:
            yield "zero_shot needs `prompts`"
        if self.own(spec).protocol == "mmkd_official" and spec.classes is None:
            yield "protocol mmkd_official needs `classes`: their order decides the F1"

    def validates(self, spec: DatasetSpec) -> bool:
        return spec.measures.calibrates and spec.rows.val is not None

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        return official.SCORING if self.own(spec).protocol == "mmkd_official" else STANDARD

    def problems(self, data: DatasetRows) -> list[str]:
        leaks = group_leaks(data, ("val", "test")) if self.validates(data.spec) else []
        return data.class_problems(("test",), prompts=True) + leaks

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return class probabilities, float64 (n, C), of every test image, and of validation rows where something is
        chosen on them."""
        settings = self.own(data.spec)
        # The released code takes its softmax in float32, which ties cosines that nearly agree.
        released = settings.protocol == "mmkd_official"
        scale, kind = (official.TEMPERATURE, np.float32) if released else (settings.temperature, np.float64)

        def probabilities(split: Split) -> tuple[Floats, Bools]:
            members = [class_cosines(data, member, split=split) for member in features.each_member()]
            score = np.mean([softmax((cosines * scale).astype(kind), axis=1) for cosines, _ in members], axis=0)
            available = np.logical_and.reduce([there for _, there in members])
            score[~available] = np.nan
            return score.astype(np.float64), available

        score, available = probabilities("test")
        info = {
            "temperature": scale,
            "protocol": settings.protocol,
            "prompts": np.bincount(data.prompt_labels(), minlength=len(data.classes)).tolist(),
            **prompt_facts(data, features),
        }
        held = None
        if self.validates(data.spec):
            samples, (held_score, there) = data.split("val"), probabilities("val")
            for leak in group_leaks(data, ("val", "test")):
                raise UserError(leak)
            if not there.any():
                raise UserError(f"none of the {len(samples)} val rows has features to choose a temperature or sets on")
            info["warnings"] += without_features(int(there.sum()), len(samples), "val rows")
            held = Validation(data.labels(samples)[there], held_score[there])
        return answers_of_test(data, score, available, data.classes, info=info, labeled=True, validation=held)


def prompt_facts(data: DatasetRows, features: Features) -> dict[str, Any]:
    """Digest of the prompts that the model has features of, and a warning where it lacks some."""
    ids, warnings = [], []
    for prompts in (samples for name, samples in data.texts.items() if name in ("prompt", "negative prompt")):
        there = features.texts(prompts.rows).available
        ids.extend(prompts.ids[there].tolist())
        warnings += without_features(int(there.sum()), len(prompts), f"{prompts.name}s")
    return {"choices": choices_digest(ids), "warnings": warnings}


def class_vectors(texts: Singles, labels: Ints, classes: int) -> Singles:
    """Return the mean of each class' unit prompt vectors, again of unit length (else prompts that agree would outscore
    those that differ): float32 (classes, D). Radford et al. 2021 (CLIP), section 3.1.4. `texts`: float32 (m, D), unit
    length. `labels`: int64 (m,), class of every prompt; each class occurs."""
    sums = np.zeros((classes, texts.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, texts.astype(np.float64))
    return np.asarray(sums / np.linalg.norm(sums, axis=1, keepdims=True), dtype=np.float32)


def class_cosines(
    data: DatasetRows, model: Features, negative: bool = False, split: Split = "test"
) -> tuple[Floats, Bools]:
    """Return cosines of a split's images and the class vectors of one encoder, float64 (n, C), NaN for images without
    features; and which images have them, bool (n,). Raises UserError if a class has no prompt with features."""
    prompts = data.texts["negative prompt" if negative else "prompt"]
    images, texts = model.images(data.split(split).rows), model.texts(prompts.rows)
    labels = data.prompt_labels(negative)[texts.available]
    for i, name in enumerate(data.classes):
        if i not in labels:
            raise UserError(f"{model.model} has no text features for the {prompts.name}s of class {name!r}")
    vectors = class_vectors(texts.values[texts.available], labels, len(data.classes))
    cosines = np.full((len(images.available), len(vectors)), np.nan)
    cosines[images.available] = images.values[images.available] @ vectors.T
    return cosines, images.available
