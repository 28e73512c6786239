"""Diagnosis of slides from bags of patch features, by patients: attention over patches against their plain mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from mmkd.evaluate.bags import BagFeatures, make_bags
from mmkd.evaluate.classification import scoring_with_primary, standard_metrics
from mmkd.evaluate.cross_validation import Round, answers, folds_of, rounds
from mmkd.evaluate.dataset import SPLIT, SPLITS, DatasetRows
from mmkd.evaluate.features import Features
from mmkd.evaluate.folds import folded_resamples, mean_over_folds
from mmkd.evaluate.linear_probe import Labelled, choose_c, fit
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.settings import DiagnosisSettings, TaskSettings
from mmkd.evaluate.splits import shared_groups
from mmkd.evaluate.task import Scoring, Variant
from mmkd.store import UserError
from mmkd.store.layout import Tower


class Diagnosis:
    """Class probabilities of every bag of the test rows.

    With training rows in the suite, heads are trained on those; without, test rows are cross-validated by groups.
    """

    name = "diagnosis"
    version = 1

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """Patches."""
        return ("image",)

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """Every head, with each draw of folds and first weights."""
        own = settings.diagnosis
        return tuple(Variant(head=head, seed=seed) for head in own.heads for seed in range(own.seeds))

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Classification metrics within folds, averaged over folds; patients are resampled inside their folds."""
        metrics = {name: mean_over_folds(metric) for name, metric in standard_metrics().items()}
        standard = Scoring("standard", metrics, "auroc_macro", resamples=folded_resamples)
        return scoring_with_primary(standard, settings.diagnosis.primary)

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """Every bag has one class and one patient, no patient stands in two splits, folds can be drawn."""
        try:
            slides = _Slides(data)
            slides.folds(settings.diagnosis, seed=0)
        except UserError as error:
            return [str(error)]
        return []

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Class probabilities of every test bag, float64 (n, C)."""
        settings = data.spec.settings.diagnosis
        slides = _Slides(data)
        fold = slides.folds(settings, variant.seed)
        known = BagFeatures(slides.bags, features, "image")
        means, there = known.means()
        cohort = Labelled(means, slides.y, slides.group)
        info: dict[str, Any] = {"chosen": [], "trained_on": int((there & (fold < 0)).sum())}
        head = _mean_pool if variant.head == "mean_pool" else _attention
        every_round = rounds(fold, there, slides.y, slides.group, variant.seed)
        how = (variant, settings, len(data.classes))
        score = answers(len(there), len(data.classes), every_round, lambda one: head(known, cohort, one, how, info))
        tested = fold >= 0
        return Predictions(
            ids=slides.bags.ids[tested],
            group=slides.group[tested],
            domain=slides.bags.domains[tested],
            y=slides.y[tested],
            score=score[tested],
            available=there[tested],
            columns=data.classes,
            info=info,
            fold=fold[tested],
        )


class _Slides:
    """The bags of all splits with their classes and patients."""

    def __init__(self, data: DatasetRows) -> None:
        self.data = data
        samples = data.joined(tuple(name for name in SPLITS if name in data.splits))
        self.bags = make_bags(data, samples, data.spec.bag)
        self.y = np.asarray(self.bags.agreed(data.labels(samples).astype(object), data.label_column), dtype=np.int64)
        self.group = self.bags.groups
        self.split = self.bags.column(SPLIT)
        for name in SPLITS[:2]:
            both = shared_groups(self.group[self.split == name], self.group[self.split == "test"])
            if both:
                raise UserError(f"{data.spec.dataset}: {both[0]!r} stands both in {name} and in test")

    def folds(self, settings: DiagnosisSettings, seed: int) -> NDArray[np.int64]:
        """Round that tests a bag, int64 (n,); -1 for training bags of the suite's own splits."""
        if self.data.spec.rows.train is not None:
            return np.where(self.split == "test", 0, -1).astype(np.int64)
        return folds_of(self.bags, self.y, self.group, settings.folds, seed)


def _mean_pool(
    known: BagFeatures, cohort: Labelled, one: Round, how: tuple[Variant, DiagnosisSettings, int], info: dict[str, Any]
) -> Floats:
    """Logistic regression on mean features, C chosen as in the linear probe: float64 (m, C)."""
    variant, settings, classes = how
    seen = cohort.take(one.seen)
    if len(np.unique(seen.y)) < 2:
        raise UserError(f"fold {one.number} leaves only class {seen.y[0]} to train on")
    c, chosen = choose_c(cohort.take(one.train), cohort.take(one.val), settings.probe, variant.seed)
    model, _ = fit(seen, c, settings.probe)
    info["chosen"].append(chosen)
    score = np.zeros((len(one.test), classes))
    score[:, model.classes_] = model.predict_proba(cohort.x[one.test])
    return score


def _attention(
    known: BagFeatures, cohort: Labelled, one: Round, how: tuple[Variant, DiagnosisSettings, int], info: dict[str, Any]
) -> Floats:
    """Gated attention over patches, float64 (m, C)."""
    from mmkd.evaluate.heads.abmil import classify_task, fit_predict  # noqa: PLC0415 (torch, for those who ask for it)

    variant, settings, classes = how
    task = classify_task(cohort.y, classes)
    logits, kept = fit_predict(known, task, (one.train, one.val, one.test), settings.mil, variant.seed)
    info["chosen"].append({"epoch": kept})
    return np.asarray(softmax(logits, axis=1), dtype=np.float64)
