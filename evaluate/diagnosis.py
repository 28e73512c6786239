"""Diagnosis of slides from bags of patch features, by patients: attention over patches against their plain mean."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy.special import softmax

from mmkd.base.arrays import Floats, Ints
from mmkd.base.errors import UserError
from mmkd.evaluate.dataset import SPLIT, SPLITS, DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import BagFeatures, Features, make_bags
from mmkd.evaluate.heads.settings import MilSettings, Trained, budget_warnings
from mmkd.evaluate.linear_probe import Labeled, LinearProbeSettings, choose_c, class_probabilities, fit, fit_warnings
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import STANDARD, Metric, Scoring
from mmkd.evaluate.splits import Round, answers, folded_resamples, folds_of, mean_over_folds, rounds, shared_groups
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_bags, without_features


class DiagnosisSettings(TaskSettings):
    """A diagnosis from bags of patches, cross-validated by patients or on the suite's own splits."""

    heads: tuple[Literal["mean_pool", "abmil"], ...] = ("mean_pool", "abmil")
    normalized: bool = False
    """Scale every vector to unit length before pooling and attention. Either head scales its inputs as a whole."""
    folds: int = Field(default=5, ge=2)
    seeds: int = Field(default=3, ge=1)
    mil: MilSettings = MilSettings()
    probe: LinearProbeSettings = LinearProbeSettings()
    """Regularization search of `mean_pool`; its shares and seeds are unused."""


class Diagnosis(Task[DiagnosisSettings]):
    """Class probabilities of every bag of the test rows. With training rows in the suite, heads are trained on those;
    without, test rows are cross-validated by groups."""

    name = "diagnosis"
    version = 2
    answers = "classes"
    settings = DiagnosisSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        if spec.label is None:
            yield "diagnosis needs a `label` column"

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        own = self.own(spec)
        return tuple(Variant(head=head, seed=seed) for head in own.heads for seed in range(own.seeds))

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Classification metrics within folds, averaged over folds; patients are resampled inside their folds."""
        metrics = {name: Metric(mean_over_folds(metric)) for name, metric in STANDARD.metrics.items()}
        return replace(STANDARD, metrics=metrics, resamples=folded_resamples)

    def problems(self, data: DatasetRows) -> list[str]:
        _Slides(data).folds(self.own(data.spec), seed=0)
        return []

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        slides = _Slides(data)
        return {
            f"{split} bags": dict(Counter(data.classes[y] for y in slides.y[slides.split == split]))
            for split in SPLITS
            if split in data.splits
        }

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return class probabilities of every test bag, float64 (n, C)."""
        settings, slides = self.own(data.spec), _Slides(data)
        fold = slides.folds(settings, variant.seed)
        known = BagFeatures(slides.bags, features, "image", settings.normalized)
        means, there = known.means()
        cohort = Labeled(means, slides.y, slides.group)
        chosen: list[dict[str, Any]] = []
        classes = len(data.classes)

        def probabilities(one: Round) -> Floats:
            if len(np.unique(cohort.y[one.seen])) < 2:
                raise UserError(f"fold {one.number} leaves only class {cohort.y[one.seen][0]} to train on")
            if variant.head == "mean_pool":
                score, facts = _mean_pool(cohort, one, settings=settings.probe, seed=variant.seed, classes=classes)
            else:
                # torch, for those who ask for it
                from mmkd.evaluate.heads.abmil import classify_task, fit_predict  # noqa: PLC0415

                task = classify_task(cohort.y, classes)
                logits, trained = fit_predict(known, task, one, settings=settings.mil, seed=variant.seed)
                score, facts = np.asarray(softmax(logits, axis=1), dtype=np.float64), trained._asdict()
            chosen.append(facts)
            return score

        score = answers(len(there), classes, rounds(fold, there, slides.y, slides.group, variant.seed), probabilities)
        tested = fold >= 0
        trained_on = int((there & ~tested).sum())
        info: dict[str, Any] = {
            "chosen": chosen,
            "trained_on": trained_on,
            "normalized": settings.normalized,
            "warnings": fit_warnings([one for one in chosen if "converged" in one])
            + without_features(trained_on, int((~tested).sum()), "training bags")
            + budget_warnings([Trained(**one) for one in chosen if "epoch" in one]),
        }
        return answers_of_bags(slides.bags, score, there, data.classes, info=info, fold=fold, y=slides.y)


class _Slides:
    """The bags of all splits with their classes and patients."""

    def __init__(self, data: DatasetRows) -> None:
        self.data = data
        samples = data.joined(tuple(name for name in SPLITS if name in data.splits))
        self.bags = make_bags(data, samples, data.spec.bag)
        self.y = self.bags.agreed(data.labels(samples).astype(object), data.label_column).astype(np.int64)
        self.group = self.bags.groups
        self.split = self.bags.column(SPLIT)
        for name in SPLITS[:2]:
            if both := shared_groups(self.group[self.split == name], self.group[self.split == "test"]):
                raise UserError(f"{data.spec.dataset}: {both[0]!r} stands both in {name} and in test")

    def folds(self, settings: DiagnosisSettings, seed: int) -> Ints:
        """Round that tests each bag, int64 (n,); -1 for training bags of the suite's own splits."""
        if self.data.spec.rows.train is not None:
            return np.where(self.split == "test", 0, -1).astype(np.int64)
        return folds_of(self.bags, self.y, self.group, settings.folds, seed)


def _mean_pool(
    cohort: Labeled, one: Round, *, settings: LinearProbeSettings, seed: int, classes: int
) -> tuple[Floats, dict[str, Any]]:
    """Fit logistic regression on mean features, C chosen as in the linear probe: float64 (m, C), and facts. Features
    are divided by the root mean square length of the training bags', so that the grid of C suits them."""
    length = np.sqrt(np.square(cohort.x[one.seen]).sum(axis=1).mean())
    scaled = replace(cohort, x=cohort.x / length)
    c, facts = choose_c(scaled.take(one.train), scaled.take(one.val), settings, seed)
    model, facts["converged"] = fit(scaled.take(one.seen), c, settings)
    return class_probabilities(model, scaled.x[one.test], classes), facts
