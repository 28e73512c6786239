"""Linear probe: logistic regression on unit features, with C chosen on validation data for every model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from mmkd.evaluate.classification import class_problems, scoring_with_primary, standard_metrics
from mmkd.evaluate.dataset import DatasetRows, Split
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.settings import LinearProbeSettings, TaskSettings
from mmkd.evaluate.splits import draw_share, hold_out, shared_groups
from mmkd.evaluate.task import Scoring, Variant
from mmkd.store import UserError
from mmkd.store.layout import Tower

SMALLEST = 1e-15
"""Probabilities are clipped here before the logarithm, as scikit-learn's `log_loss` does for float64."""


@dataclass(frozen=True)
class Labelled:
    """Features with labels. x: float64 (n, D); y: int64 (n,); group: str (n,)."""

    x: Floats
    y: NDArray[np.int64]
    group: NDArray[np.object_]

    def take(self, chosen: NDArray[Any]) -> Labelled:
        """Rows by mask or position."""
        return Labelled(self.x[chosen], self.y[chosen], self.group[chosen])

    def joined(self, other: Labelled) -> Labelled:
        """The rows of both."""
        return Labelled(
            np.concatenate([self.x, other.x]),
            np.concatenate([self.y, other.y]),
            np.concatenate([self.group, other.group]),
        )


class LinearProbe:
    """L2-regularised softmax regression by L-BFGS. An ensemble probes its members' features side by side."""

    name = "linear_probe"
    version = 1

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """Images."""
        return ("image",)

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """Every share of the labels; shares below 1 are drawn several times."""
        return probe_variants(settings.linear_probe)

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Standard metrics; the primary one is the macro AUROC unless the settings say otherwise."""
        standard = Scoring("standard", standard_metrics(), primary="auroc_macro", proportions=frozenset({"acc"}))
        return scoring_with_primary(standard, settings.linear_probe.primary)

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """Labels must be classes, and no group may stand in two splits."""
        return class_problems(data, probe_splits(data)) + group_leaks(data)

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Class probabilities, float64 (n, C), of every test image."""
        settings = data.spec.settings.linear_probe
        leaks = group_leaks(data)
        if leaks:
            raise UserError(leaks[0])
        train = _share(_labelled(data, "train", features), variant, settings)
        val = _share(_labelled(data, "val", features), variant, settings) if data.spec.rows.val is not None else None
        c, info = choose_c(train, val, settings, variant.seed)
        everything = train if val is None else train.joined(val)
        model, warned = fit(everything, c, settings)
        test = data.split("test")
        images = features.images(test.rows)
        score = np.full((len(test), len(data.classes)), np.nan)
        score[images.available] = 0.0
        score[np.ix_(images.available, model.classes_)] = model.predict_proba(
            images.values[images.available].astype(np.float64)
        )
        info |= {"train_rows": len(everything.y), "train_classes": len(model.classes_), "converged": not warned}
        return Predictions(
            ids=test.ids,
            group=data.groups(test),
            domain=data.domains(test),
            y=data.labels(test),
            score=score,
            available=images.available,
            columns=data.classes,
            info=info,
        )


def probe_variants(settings: LinearProbeSettings) -> tuple[Variant, ...]:
    """Every share of the labels; shares below 1 are drawn several times."""
    return tuple(
        Variant(fraction=fraction, seed=seed)
        for fraction in settings.fractions
        for seed in range(settings.seeds if fraction < 1 else 1)
    )


def probe_splits(data: DatasetRows) -> tuple[Split, ...]:
    """The splits that a probe reads."""
    return ("train", "val", "test") if data.spec.rows.val is not None else ("train", "test")


def group_leaks(data: DatasetRows) -> list[str]:
    """Groups that stand in two splits: such a score would measure memory."""
    splits = probe_splits(data)
    return [text for i, one in enumerate(splits) for text in _leaks(data, one, splits[i + 1 :])]


def choose_c(
    train: Labelled, val: Labelled | None, settings: LinearProbeSettings, seed: int
) -> tuple[float, dict[str, Any]]:
    """The C of the grid with the lowest validation log-loss; the smaller of two that are equal.

    Without validation rows a fifth of the training groups is held out; without groups to hold out,
    `settings.fallback_c` is taken and the result says so.
    """
    if val is None:
        out = hold_out(train.y, train.group, seed)
        train, val = train.take(~out), train.take(out)
    # A class that is not in the training part cannot tell one C from another.
    val = val.take(np.isin(val.y, train.y))
    if len(val.y) == 0 or len(np.unique(train.y)) < 2:
        return settings.fallback_c, {"c": settings.fallback_c, "c_chosen_on": 0}
    losses = _losses(train, val, settings)
    best = int(np.argmin(losses))
    chosen = float(settings.grid()[best])
    return chosen, {"c": chosen, "c_chosen_on": len(val.y), "c_at_edge": best in (0, len(losses) - 1)}


def _losses(train: Labelled, val: Labelled, settings: LinearProbeSettings) -> Floats:
    """Validation log-loss for every C, float64 (steps,); each fit starts from the one before."""
    losses = np.empty(settings.c_steps)
    warm: LogisticRegression | None = None
    for i, c in enumerate(settings.grid()):
        warm, _ = fit(train, float(c), settings, warm)
        proba = warm.predict_proba(val.x)
        right = proba[np.arange(len(val.y)), np.searchsorted(warm.classes_, val.y)]
        losses[i] = -np.log(np.clip(right, SMALLEST, 1.0)).mean()
    return losses


def fit(
    data: Labelled, c: float, settings: LinearProbeSettings, warm: LogisticRegression | None = None
) -> tuple[LogisticRegression, bool]:
    """Fit logistic regression at one C, from where `warm` stopped if given; the flag tells that iterations ran out."""
    model = warm or LogisticRegression(max_iter=settings.max_iter, warm_start=True)
    model.set_params(C=c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(data.x, data.y)
    ran_out = [one for one in caught if issubclass(one.category, ConvergenceWarning)]
    for other in caught:
        if other not in ran_out:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return model, bool(ran_out)


def _labelled(data: DatasetRows, split: Split, features: Features) -> Labelled:
    """The rows of a split that the model has features of.

    float64, because scikit-learn's L-BFGS stops early in float32 at large C.
    """
    samples = data.split(split)
    images = features.images(samples.rows)
    there = images.available
    if not there.any():
        raise UserError(f"{features.model} has no image features for any of the {len(samples)} {split} rows")
    return Labelled(images.values[there].astype(np.float64), data.labels(samples)[there], data.groups(samples)[there])


def _share(data: Labelled, variant: Variant, settings: LinearProbeSettings) -> Labelled:
    share = min(variant.fraction, settings.max_train / len(data.y))
    return data if share >= 1 else data.take(draw_share(data.y, share, variant.seed))


def _leaks(data: DatasetRows, one: Split, others: tuple[Split, ...]) -> list[str]:
    found = []
    for other in others:
        if other not in data.splits:
            continue
        shared = shared_groups(data.groups(data.splits[one]), data.groups(data.splits[other]))
        if shared:
            what = data.spec.group or "key"
            found.append(
                f"{data.spec.dataset}: {len(shared)} values of {what} stand in both {one} and {other}, "
                f"for example {shared[0]!r}; divide the splits by {what}"
            )
    return found
