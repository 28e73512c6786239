"""Linear probe with several labels per sample: a logistic regression for every label, one against the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.dataset import DatasetRows, Split
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.linear_probe import (
    Labelled,
    LinearProbeSettings,
    choose_c,
    fit,
    fit_warnings,
    group_leaks,
    probe_splits,
    refuse_leaks,
)
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.multilabel import (
    UNKNOWN,
    Truth,
    label_counts,
    label_problems,
    multilabel_needs,
    multilabel_scoring,
    predictions,
    truth,
)
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.splits import draw_share
from mmkd.evaluate.task import Scoring, Task, Variant, without_features
from mmkd.store import UserError


class MultilabelProbe(Task[LinearProbeSettings]):
    """As `linear_probe` for every label, on the samples where it is known; C is chosen for each."""

    name = "multilabel_probe"
    version = 2
    settings = LinearProbeSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        """Yield the needs: several labels and training rows."""
        yield from multilabel_needs(self.name, spec)
        if spec.rows.train is None:
            yield f"{self.name} needs `rows: train`"

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        """Return every share of the labels; shares below 1 are drawn several times."""
        return self.own(spec).variants()

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Return means over labels of the areas under the ROC curve and of the average precision."""
        return multilabel_scoring()

    def problems(self, data: DatasetRows) -> list[str]:
        """Every label needs positives and negatives in every split, and no group may be in two splits."""
        return label_problems(data, probe_splits(data)) + group_leaks(data)

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        """Return positive, negative and unknown samples of every label in every split."""
        return label_counts(data, probe_splits(data))

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return a probability for every label of every test image; one half where a label cannot be trained."""
        refuse_leaks(data)
        settings = self.own(data.spec)
        found = {split: _part(data, split, features) for split in probe_splits(data) if split != "test"}
        train, val = (_share(found[split], variant, settings) if split in found else None for split in ("train", "val"))
        assert train is not None, "the suite requires training rows for this task"
        images = features.images(data.split("test").rows)
        x = images.values[images.available].astype(np.float64)
        score = np.full((len(images.available), len(data.classes)), np.nan)
        fits: dict[str, dict[str, Any]] = {}
        constant: list[str] = []
        for label, name in enumerate(data.classes):
            mine, held = train.of(label), None if val is None else val.of(label)
            if len(np.unique(mine.y)) < 2:
                constant.append(name)
                score[images.available, label] = 0.5
                continue
            c, fits[name] = choose_c(mine, held, settings, variant.seed)
            model, fits[name]["converged"] = fit(mine if held is None else mine.joined(held), c, settings)
            score[images.available, label] = model.predict_proba(x)[:, 1]
        info: dict[str, Any] = {
            "c": {name: facts["c"] for name, facts in fits.items()},
            "labels_not_trained": constant,
            "train_rows": len(train.x),
            "warnings": fit_warnings(list(fits.values())),
        }
        for split, part in found.items():
            info["warnings"] += without_features(len(part.x), len(data.split(split)), f"{split} rows")
        if constant:
            names = ", ".join(constant)
            info["warnings"].append(f"training rows of {names} are all alike: score one half, counted in the means")
        return predictions(data, score, images.available, info)


class _Part:
    """The rows of a split that the model has features of. x: float64 (n, D); truth: (n, L); group: str (n,)."""

    def __init__(self, x: Floats, known: Truth, group: NDArray[np.object_]) -> None:
        self.x, self.truth, self.group = x, known, group

    def take(self, chosen: NDArray[np.int64]) -> _Part:
        """Return rows by position."""
        return _Part(self.x[chosen], self.truth[chosen], self.group[chosen])

    def of(self, label: int) -> Labelled:
        """Return the rows where one label is known."""
        rows = self.truth[:, label] != UNKNOWN
        return Labelled(self.x[rows], self.truth[rows, label].astype(np.int64), self.group[rows])


def _part(data: DatasetRows, split: Split, features: Features) -> _Part:
    samples = data.split(split)
    images = features.images(samples.rows)
    there = images.available
    if not there.any():
        raise UserError(f"{features.model} has no image features for any of the {len(samples)} {split} rows")
    return _Part(images.values[there].astype(np.float64), truth(data, samples)[there], data.groups(samples)[there])


def _share(part: _Part, variant: Variant, settings: LinearProbeSettings) -> _Part:
    """Return a share of the rows, drawn within the rarest label that each has, so that rare labels stay in."""
    share = min(variant.fraction, settings.max_train / len(part.x))
    if share >= 1:
        return part
    counts = (part.truth == 1).sum(axis=0)
    rarest = np.argsort(counts, kind="stable")
    has = part.truth[:, rarest] == 1
    stratum = np.where(has.any(axis=1), has.argmax(axis=1), len(counts))
    return part.take(draw_share(stratum.astype(np.int64), share, variant.seed))


TASK = MultilabelProbe()
