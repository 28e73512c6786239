"""Linear probe with several labels a sample: a logistic regression for every label, one against the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.classification import scoring_with_primary
from mmkd.evaluate.dataset import DatasetRows, Split
from mmkd.evaluate.features import Features
from mmkd.evaluate.linear_probe import Labelled, choose_c, fit, group_leaks, probe_splits, probe_variants
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.multilabel import UNKNOWN, Truth, label_problems, multilabel_scoring, predictions, truth
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.settings import LinearProbeSettings, TaskSettings
from mmkd.evaluate.splits import draw_share
from mmkd.evaluate.task import Scoring, Variant
from mmkd.store import UserError
from mmkd.store.layout import Tower


class MultilabelProbe:
    """As `linear_probe` for every label, on the samples where it is known; C is chosen for each."""

    name = "multilabel_probe"
    version = 1

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """Images."""
        return ("image",)

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """Every share of the labels; shares below 1 are drawn several times."""
        return probe_variants(settings.multilabel_probe)

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Means over labels of the areas under the ROC curve and of the average precision."""
        return scoring_with_primary(multilabel_scoring(), settings.multilabel_probe.primary)

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """Every label needs positives and negatives in every split, and no group may stand in two splits."""
        return label_problems(data, probe_splits(data)) + group_leaks(data)

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """A probability for every label of every test image."""
        leaks = group_leaks(data)
        if leaks:
            raise UserError(leaks[0])
        settings = data.spec.settings.multilabel_probe
        train = _share(_part(data, "train", features), variant, settings)
        val = _share(_part(data, "val", features), variant, settings) if data.spec.rows.val is not None else None
        images = features.images(data.split("test").rows)
        x = images.values[images.available].astype(np.float64)
        score = np.full((len(images.available), len(data.classes)), np.nan)
        chosen: dict[str, float] = {}
        constant: list[str] = []
        for label, name in enumerate(data.classes):
            found, c = _label_scores(
                x, (train.of(label), None if val is None else val.of(label)), settings, variant.seed
            )
            score[images.available, label] = found
            if c is None:
                constant.append(name)
            else:
                chosen[name] = c
        info: dict[str, Any] = {"c": chosen, "labels_not_trained": constant, "train_rows": len(train.x)}
        return predictions(data, score, images.available, info)


class _Part:
    """The rows of a split that the model has features of. x: float64 (n, D); truth: (n, L); group: str (n,)."""

    def __init__(self, x: Floats, known: Truth, group: NDArray[np.object_]) -> None:
        self.x, self.truth, self.group = x, known, group

    def take(self, chosen: NDArray[np.int64]) -> _Part:
        """Rows by position."""
        return _Part(self.x[chosen], self.truth[chosen], self.group[chosen])

    def of(self, label: int) -> Labelled:
        """The rows where one label is known."""
        rows = self.truth[:, label] != UNKNOWN
        return Labelled(self.x[rows], self.truth[rows, label].astype(np.int64), self.group[rows])


def _label_scores(
    x: Floats, parts: tuple[Labelled, Labelled | None], settings: LinearProbeSettings, seed: int
) -> tuple[Floats, float | None]:
    """Probabilities of one label (n,) and its C; one half and None where training rows are all alike."""
    train, val = parts
    everything = train if val is None else train.joined(val)
    if len(np.unique(train.y)) < 2:
        return np.full(len(x), 0.5), None
    c, _ = choose_c(train, val, settings, seed)
    model, _ = fit(everything, c, settings)
    return np.asarray(model.predict_proba(x)[:, 1]), c


def _part(data: DatasetRows, split: Split, features: Features) -> _Part:
    samples = data.split(split)
    images = features.images(samples.rows)
    there = images.available
    if not there.any():
        raise UserError(f"{features.model} has no image features for any of the {len(samples)} {split} rows")
    return _Part(images.values[there].astype(np.float64), truth(data, samples)[there], data.groups(samples)[there])


def _share(part: _Part, variant: Variant, settings: LinearProbeSettings) -> _Part:
    """A share of the rows, drawn within the rarest label that each has, so that rare labels stay in."""
    share = min(variant.fraction, settings.max_train / len(part.x))
    if share >= 1:
        return part
    counts = (part.truth == 1).sum(axis=0)
    rarest = np.argsort(counts, kind="stable")
    has = part.truth[:, rarest] == 1
    stratum = np.where(has.any(axis=1), has.argmax(axis=1), len(counts))
    return part.take(draw_share(stratum.astype(np.int64), share, variant.seed))
