"""Several labels a sample: what is true of every sample and label, and the metrics over labels."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.evaluate.dataset import DatasetRows, Samples, Split
from mmkd.evaluate.metrics import Floats, auroc, average_precision, mean_over_classes
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.task import Metric, Scoring

UNKNOWN = -1
Truth = NDArray[np.int8]


def truth(data: DatasetRows, samples: Samples) -> Truth:
    """1 where a sample has a label, 0 where it has not, -1 where that is not known: int8 (n, L).

    Raises:
        UserError: a list of labels that cannot be read.
    """
    spec, classes = data.spec.multilabel, data.spec.classes
    assert spec is not None, "the suite requires it for this task"
    assert classes is not None, "the suite requires it for this task"
    found = np.full((len(samples), len(classes)), UNKNOWN, dtype=np.int8)
    if spec.column is not None:
        for row, (cell, key) in enumerate(zip(samples.column(spec.column), samples.ids, strict=True)):
            if cell is not None:
                listed = _listed(cell, spec.separator, f"{data.spec.dataset}: {samples.name} row {key!r}")
                found[row] = [bool(listed & set(values)) for values in classes.values()]
        return found
    for label, columns in enumerate(classes.values()):
        cells = np.stack([samples.column(column).astype(str) for column in columns])
        found[np.isin(cells, spec.negative).all(axis=0), label] = 0
        found[np.isin(cells, spec.positive).any(axis=0), label] = 1
    return found


def _listed(cell: str, separator: str | None, where: str) -> set[str]:
    if separator is not None:
        return {value.strip() for value in cell.split(separator)}
    try:
        values = json.loads(cell) if cell.strip() else []
    except ValueError:
        values = None
    if not isinstance(values, list):
        raise UserError(f"{where} has the labels {cell!r}, expected a JSON list; say the `separator` of multilabel")
    return {value if isinstance(value, str) else json.dumps(value) for value in values}


def label_problems(data: DatasetRows, splits: tuple[Split, ...]) -> list[str]:
    """Labels that no sample of a split has, or every one: nothing can be measured of them."""
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


def predictions(data: DatasetRows, score: Floats, available: NDArray[np.bool_], info: dict[str, object]) -> Predictions:
    """The answers for all test samples: a score for every label (n, L), and beside it what is true."""
    test = data.split("test")
    columns = np.column_stack([score, truth(data, test).astype(np.float64)])
    columns[~available] = np.nan
    return Predictions(
        ids=test.ids,
        group=data.groups(test),
        domain=data.domains(test),
        y=None,
        score=columns,
        available=available,
        columns=(*data.classes, *(f"is {name}" for name in data.classes)),
        info=info,
    )


def multilabel_scoring() -> Scoring:
    """Mean area under the ROC curve over labels, and mean average precision."""
    metrics: dict[str, Metric] = {"auroc_mean": _over_labels(auroc), "map": _over_labels(average_precision)}
    return Scoring("standard", metrics, primary="auroc_mean")


def _over_labels(metric: Callable[[NDArray[np.bool_], Floats, Floats], Floats]) -> Metric:
    """The mean of a metric over the labels that it has a value of, each on the samples where the label is known."""

    def mean(found: Predictions, weights: Floats) -> Floats:
        labels = len(found.columns) // 2
        score, known = found.score[:, :labels], found.score[:, labels:]
        values = []
        for label in range(labels):
            rows = known[:, label] != UNKNOWN
            values.append(metric(known[rows, label] == 1, score[rows, label], weights[:, rows]))
        return mean_over_classes(np.stack(values, axis=1))

    return mean
