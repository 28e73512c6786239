"""Several labels per sample, every label for itself: zero-shot classification and a linear probe."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import expit

from mmkd.base.arrays import Floats
from mmkd.base.errors import UserError, collect
from mmkd.base.text import cell_text
from mmkd.evaluate.calibration import calibration_error
from mmkd.evaluate.dataset import DatasetRows, Samples, Split, value_counts
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.linear_probe import Labeled, LinearProbe, fit_chosen, fit_warnings, training_rows
from mmkd.evaluate.metrics import auroc, average_precision, mean_of_defined, weighted_mean
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import Metric, Score, Scoring
from mmkd.evaluate.splits import group_leaks, probe_splits
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_test
from mmkd.evaluate.zero_shot import class_cosines, prompt_facts

UNKNOWN = -1
MEANINGS = (("positive", 1), ("negative", 0), ("unknown", UNKNOWN))


class MultilabelZeroShotSettings(TaskSettings):
    """Zero-shot classification with several labels per sample: every label for itself."""

    temperature: float = Field(default=100.0, gt=0)
    """Factor on the difference of positive and negative cosine before the logistic function, as in `zero_shot`.
    Without negative prompts the score is the bare cosine; the metrics look at the order within a label only."""


class MultilabelZeroShot(Task[MultilabelZeroShotSettings]):
    """Presence against absence with negative prompts, else the cosine to the label's prompts. The pair of a positive
    and a negative prompt with a softmax over both is CheXzero's (Tiu et al. 2022). An ensemble averages its members'
    scores."""

    name = "multilabel_zero_shot"
    version = 2
    answers = "labels"
    settings = MultilabelZeroShotSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        if spec.multilabel is None or not spec.classes:
            yield f"{self.name} needs `multilabel` and `classes`"
        if spec.prompts is None:
            yield f"{self.name} needs `prompts`"

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        return _scoring(spec)

    def problems(self, data: DatasetRows) -> list[str]:
        found = label_problems(data, ("test",)) + _no_probabilities(data)
        with collect(found):
            data.prompt_labels()
            if "negative prompt" in data.texts:
                data.prompt_labels(negative=True)
        return found

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        return label_counts(data, ("test",))

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return a score for every label of every test image."""
        for problem in _no_probabilities(data):
            raise UserError(problem)
        scale = self.own(data.spec).temperature
        scores, available = [], []
        for member in features.each_member():
            score, there = class_cosines(data, member)
            if "negative prompt" in data.texts:
                # The softmax over two is the logistic function of their difference.
                score = expit(scale * (score - class_cosines(data, member, negative=True)[0]))
            scores.append(score)
            available.append(there)
        kind = "bare cosine" if "negative prompt" not in data.texts else "positive against negative prompts"
        info = {"score": kind, "temperature": scale, **prompt_facts(data, features)}
        return predictions(data, np.mean(scores, axis=0), np.logical_and.reduce(available), info)


def _no_probabilities(data: DatasetRows) -> list[str]:
    """Report calibration of scores that are bare cosines."""
    if "negative prompt" in data.texts or data.spec.measures.calibration is None:
        return []
    return [
        f"{data.spec.dataset}: without negative prompts scores of multilabel_zero_shot are cosines, not probabilities; "
        "write `measures: {calibration: null}`, or add negative prompts"
    ]


class MultilabelProbe(LinearProbe):
    """As `linear_probe` for every label, on the samples where it is known; C is chosen for each."""

    name = "multilabel_probe"
    answers = "labels"

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        if spec.multilabel is None or not spec.classes:
            yield f"{self.name} needs `multilabel` and `classes`"
        if spec.rows.train is None:
            yield f"{self.name} needs `rows: train`"
        if self.own(spec).val != "choose":
            yield f"{self.name} has no use for `val: {self.own(spec).val}`; only linear_probe calibrates on val rows"

    def validates(self, spec: DatasetSpec) -> bool:
        return False

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        return _scoring(spec)

    def problems(self, data: DatasetRows) -> list[str]:
        return label_problems(data, probe_splits(data)) + group_leaks(data, probe_splits(data))

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        return label_counts(data, probe_splits(data))

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return a probability for every label of every test image; one half where a label cannot be trained."""
        settings = self.own(data.spec)
        train, val, missing = training_rows(data, features, settings, variant, lambda samples: truth(data, samples))
        images = features.images(data.split("test").rows)
        there = images.available
        x = images.values[there].astype(np.float64)
        score = np.full((len(there), len(data.classes)), np.nan)
        fits: dict[str, dict[str, Any]] = {}
        for label, name in enumerate(data.classes):
            known, held_out = _known(train, label), None if val is None else _known(val, label)
            score[there, label] = 0.5
            if len(np.unique(known.y)) > 1:
                model, fits[name] = fit_chosen(known, held_out, settings, variant.seed)
                score[there, label] = model.predict_proba(x)[:, 1]
        constant = [name for name in data.classes if name not in fits]
        info: dict[str, Any] = {
            "c": {name: facts["c"] for name, facts in fits.items()},
            "labels_not_trained": constant,
            "train_rows": len(train.x),
            "warnings": fit_warnings(list(fits.values())) + missing,
        }
        if constant:
            names = ", ".join(constant)
            info["warnings"].append(f"training rows of {names} are all alike: score one half, counted in the means")
        return predictions(data, score, there, info)


def _known(rows: Labeled, label: int) -> Labeled:
    known = rows.take(rows.y[:, label] != UNKNOWN)
    return Labeled(known.x, known.y[:, label], known.group)


def truth(data: DatasetRows, samples: Samples) -> NDArray[np.int8]:
    """Return int8 (n, L): 1 where a sample has a label, 0 where not, -1 where unknown. Raises UserError for a list of
    labels that cannot be read, or values that the description does not name."""
    spec, classes = data.spec.multilabel, data.spec.classes or {}
    assert spec is not None, "the suite requires it for this task"
    found = np.full((len(samples), len(classes)), UNKNOWN, dtype=np.int8)
    alien: list[object] = []
    if spec.column is not None:
        known = {value for values in classes.values() for value in values} | set(spec.nothing)
        for row, (cell, key) in enumerate(zip(samples.column(spec.column), samples.ids, strict=True)):
            if cell is not None:
                listed = _listed(cell, spec.separator, f"{data.spec.dataset}: {samples.name} row {key!r}")
                found[row] = [bool(listed & set(values)) for values in classes.values()]
                alien += sorted(listed - known)
            elif "" in spec.nothing:
                found[row] = 0
        if alien:
            raise UserError(
                f"{data.spec.dataset}: {spec.column} lists {value_counts(alien)} among the {samples.name} rows, which "
                "no class has; add classes, or name values without a class under `multilabel: nothing`"
            )
        return found
    meanings = spec.meanings
    for label, (name, columns) in enumerate(classes.items()):
        cells = np.stack([samples.column(column) for column in columns])
        if alien := [cell for cell in cells.flat if cell not in meanings]:
            raise UserError(
                f"{data.spec.dataset}: {name} has {value_counts(alien)} among the {samples.name} rows; name these "
                "values under `multilabel: positive`, `negative` or `unknown`"
            )
        meaning = np.array([meanings[cell] for cell in cells.ravel().tolist()], dtype=np.int8).reshape(cells.shape)
        found[(meaning == 0).all(axis=0), label] = 0
        found[(meaning == 1).any(axis=0), label] = 1
    return found


def _listed(cell: str, separator: str | None, where: str) -> set[str]:
    values: object = None
    if separator is not None:
        values = cell.split(separator)
    else:
        with contextlib.suppress(ValueError):
            values = json.loads(cell)
    if not isinstance(values, list):
        raise UserError(f"{where} has the labels {cell!r}, expected a JSON list; say the `separator` of multilabel")
    texts = (cell_text(value if isinstance(value, str) else json.dumps(value)) for value in values)
    return {text for text in texts if text is not None}


def label_counts(data: DatasetRows, splits: tuple[Split, ...]) -> dict[str, dict[str, int]]:
    found = {}
    for split in splits:
        for name, known in zip(data.classes, truth(data, data.split(split)).T, strict=True):
            found[f"{split} {name}"] = {word: int((known == value).sum()) for word, value in MEANINGS}
    return found


def label_problems(data: DatasetRows, splits: tuple[Split, ...]) -> list[str]:
    """Labels that no sample of a split has, or every one."""
    found: list[str] = []
    for split in splits:
        with collect(found):
            known = truth(data, data.split(split)).T
            for what, value in MEANINGS[:2]:
                if bare := [name for name, column in zip(data.classes, known, strict=True) if value not in column]:
                    size = len(bare)
                    found.append(f"{data.spec.dataset}: {bare[0]!r} has no {what} {split} rows ({size} such labels)")
    return found


def predictions(data: DatasetRows, score: Floats, available: NDArray[np.bool_], info: dict[str, Any]) -> Predictions:
    """A score for every label (n, L) of all test samples, and the truth."""
    columns = np.column_stack([score, truth(data, data.split("test")).astype(np.float64)])
    columns[~available] = np.nan
    names = (*data.classes, *(f"is {name}" for name in data.classes))
    return answers_of_test(data, columns, available, names, info=info)


def _over_labels(metric: Callable[[NDArray[np.bool_], Floats, Floats], Floats]) -> Score:
    """Return the mean of a metric over labels, each on the samples where it is known."""

    def mean(found: Predictions, weights: Floats) -> Floats:
        values = []
        for score, known in zip(*np.split(found.score.T, 2), strict=True):
            rows = known != UNKNOWN
            values.append(metric(known[rows] == 1, score[rows], weights[:, rows]))
        return mean_of_defined(np.stack(values, axis=1))

    return mean


SCORING = Scoring(
    "standard",
    {"auroc_mean": Metric(_over_labels(auroc)), "map": Metric(_over_labels(average_precision))},
    primary="auroc_mean",
    contrasts=lambda found: [(known == 1, known == 0) for known in found.score[:, len(found.columns) // 2 :].T],
)
"""Means over labels of the area under the ROC curve and of the average precision."""


def _scoring(spec: DatasetSpec) -> Scoring:
    """`SCORING`, with the mean calibration error and Brier score of the labels where the data set asks for them."""
    if spec.measures.calibration is None:
        return SCORING
    bins = spec.measures.calibration.bins

    def error(known: NDArray[np.bool_], score: Floats, weights: Floats, equal_mass: bool) -> Floats:
        return calibration_error(score, known, weights, bins, equal_mass=equal_mass)

    errors = {
        name: Metric(_over_labels(partial(error, equal_mass=equal)), lower=True, centered=True)
        for name, equal in ((f"ece@{bins}", False), (f"ece_mass@{bins}", True))
    }
    squares = _over_labels(lambda known, score, weights: weighted_mean((score - known) ** 2, weights))
    return replace(SCORING, metrics=SCORING.metrics | errors | {"brier": Metric(squares, lower=True)})
