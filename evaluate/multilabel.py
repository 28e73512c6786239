"""Several labels per sample: the truth of every sample and label, and the metrics over labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.base.text import cell_text
from mmkd.evaluate.dataset import DatasetRows, Samples, Split, value_counts
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.metrics import Floats, auroc, average_precision, mean_over_classes
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.task import Contrast, Metric, Scoring, answers_of_test

UNKNOWN = -1
MEANINGS = (("positive", 1), ("negative", 0), ("unknown", UNKNOWN))
Truth = NDArray[np.int8]


def multilabel_needs(task: str, spec: DatasetSpec) -> Iterator[str]:
    """Needs of tasks with several labels per sample."""
    if spec.multilabel is None or not spec.classes:
        yield f"{task} needs `multilabel` and `classes`"


def truth(data: DatasetRows, samples: Samples) -> Truth:
    """Return int8 (n, L): 1 where a sample has a label, 0 where not, -1 where unknown. Raises UserError for a list of
    labels that cannot be read, or values that the description does not name."""
    spec, classes = data.spec.multilabel, data.spec.classes
    assert spec is not None, "the suite requires it for this task"
    assert classes is not None, "the suite requires it for this task"
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
        alien = [cell for cell in cells.flat if cell not in meanings]
        if alien:
            raise UserError(
                f"{data.spec.dataset}: {name} has {value_counts(alien)} among the {samples.name} rows; name these "
                "values under `multilabel: positive`, `negative` or `unknown`"
            )
        meaning = np.array([meanings[cell] for cell in cells.ravel().tolist()], dtype=np.int8).reshape(cells.shape)
        found[(meaning == 0).all(axis=0), label] = 0
        found[(meaning == 1).any(axis=0), label] = 1
    return found


def _listed(cell: str, separator: str | None, where: str) -> set[str]:
    if separator is not None:
        values: object = cell.split(separator)
    else:
        try:
            values = json.loads(cell)
        except ValueError:
            values = None
    if not isinstance(values, list):
        raise UserError(f"{where} has the labels {cell!r}, expected a JSON list; say the `separator` of multilabel")
    texts = (cell_text(value if isinstance(value, str) else json.dumps(value)) for value in values)
    return {text for text in texts if text is not None}


def label_counts(data: DatasetRows, splits: tuple[Split, ...]) -> dict[str, dict[str, int]]:
    """Return positive, negative and unknown samples of every label in every split."""
    found = {}
    for split in splits:
        known = truth(data, data.split(split))
        for label, name in enumerate(data.classes):
            sizes = {word: int((known[:, label] == value).sum()) for word, value in MEANINGS}
            found[f"{split} {name}"] = sizes
    return found


def label_problems(data: DatasetRows, splits: tuple[Split, ...]) -> list[str]:
    """Return labels that no sample of a split has, or every one: nothing can be measured of them."""
    found = []
    for split in splits:
        try:
            known = truth(data, data.split(split))
        except UserError as error:
            found.append(str(error))
            continue
        for value, what in ((1, "positive"), (0, "negative")):
            bare = [name for i, name in enumerate(data.classes) if not (known[:, i] == value).any()]
            if bare:
                found.append(f"{data.spec.dataset}: {bare[0]!r} has no {what} {split} rows ({len(bare)} such labels)")
    return found


def predictions(data: DatasetRows, score: Floats, available: NDArray[np.bool_], info: dict[str, Any]) -> Predictions:
    """Return the answers for all test samples: a score for every label (n, L), and the truth."""
    columns = np.column_stack([score, truth(data, data.split("test")).astype(np.float64)])
    columns[~available] = np.nan
    names = (*data.classes, *(f"is {name}" for name in data.classes))
    return answers_of_test(data, columns, available, names, info=info)


def multilabel_scoring() -> Scoring:
    """Return mean area under the ROC curve over labels, and mean average precision."""
    metrics: dict[str, Metric] = {"auroc_mean": _over_labels(auroc), "map": _over_labels(average_precision)}
    return Scoring("standard", metrics, primary="auroc_mean", contrasts=_label_contrasts)


def _label_contrasts(found: Predictions) -> list[Contrast]:
    known = found.score[:, len(found.columns) // 2 :]
    return [(column == 1, column == 0) for column in known.T]


def _over_labels(metric: Callable[[NDArray[np.bool_], Floats, Floats], Floats]) -> Metric:
    """Return the mean of a metric over the labels that it has a value of, each on the samples where the label is
    known."""

    def mean(found: Predictions, weights: Floats) -> Floats:
        labels = len(found.columns) // 2
        score, known = found.score[:, :labels], found.score[:, labels:]
        values = []
        for label in range(labels):
            rows = known[:, label] != UNKNOWN
            values.append(metric(known[rows, label] == 1, score[rows, label], weights[:, rows]))
        return mean_over_classes(np.stack(values, axis=1))

    return mean
