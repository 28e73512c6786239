"""Rows whose features are examined for a class and a confounder: the same for all models."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.base.text import cell_text, counted
from mmkd.evaluate import robustness
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.robustness import Codes, Combination, TrustSettings
from mmkd.evaluate.splits import draw_folds

NO_CELLS = "no two classes that two sites both have"


@dataclass(frozen=True)
class Cohort:
    """Rows of a data set that all models have features of and that have both values. rows: grid rows, int64 (n,);
    biology, confounder, group: codes, int64 (n,). queries, probed: positions, int64, ascending, whose neighbors are
    searched and that the linear probe reads. probe_fold, cell_fold: folds, int64, of `probed` and of the rows of the
    first combination, empty if it is too small. remarks: what was left out."""

    dataset: str
    store: str
    biology_column: str
    confounder_column: str
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    rows: Codes
    biology: Codes
    confounder: Codes
    group: Codes
    queries: Codes
    probed: Codes
    probe_fold: Codes
    cell_fold: Codes
    combinations: tuple[Combination, ...]
    digest: str
    remarks: tuple[str, ...]

    @property
    def table(self) -> NDArray[np.int64]:
        """Rows of each class at each site, int64 (C, S)."""
        return robustness.contingency(self.biology, self.confounder)

    @property
    def too_small(self) -> str:
        """Why the generalization experiment, on the first combination, cannot be made, or nothing."""
        return too_small(self.combinations, self.group)


def too_small(every: Sequence[Combination], group: Codes) -> str:
    if not every:
        return NO_CELLS
    rows, cell, need = every[0].rows, every[0].cell, robustness.FEWEST_IN_CELL
    least = min(len(np.unique(group[rows[cell == one]])) for one in range(4))
    return f"{least} groups in the smallest of its cells, expected {need} or more" if least < need else ""


def load_cohort(
    data: DatasetRows, features: Sequence[Features], columns: tuple[str, str], settings: TrustSettings
) -> Cohort:
    """Take the rows of all splits, loaded with both `columns`, that have both values and features of every model.
    Raises UserError as `measure_trust`."""
    spec = data.spec
    filled = [name for name, split in data.splits.items() if len(split)]
    samples = data.joined(tuple(filled or ["test"]))  # type: ignore[arg-type]
    rows, first = np.unique(samples.rows, return_index=True)
    cells = [np.array([cell_text(one) for one in samples.column(name)[first]], dtype=object) for name in columns]
    if columns[0] == spec.label:
        names = {value: data.classes[i] for value, i in data.class_of.items()}
        cells[0] = np.array([names.get(value) for value in cells[0]], dtype=object)
    there, remarks = _complete(spec, rows, features, dict(zip(columns, cells, strict=True)))
    kept = [one[there] for one in (samples.ids[first], *cells, data.groups(samples)[first])]
    coded = [np.unique(one.astype(str), return_inverse=True) for one in kept[1:]]
    classes, sites, groups = (tuple(names.tolist()) for names, _ in coded)
    biology, confounder, group = (np.asarray(code, dtype=np.int64) for _, code in coded)
    for values, column in ((classes, columns[0]), (sites, columns[1])):
        if len(values) < 2:
            raise UserError(
                f"{spec.dataset}: {column} has only the value {values[0]!r} among the rows with features; expected two "
                "or more"
            )
    if len(groups) < 2:
        raise UserError(f"{spec.dataset}: all rows are of one group; expected two or more patients")
    _check_crossed(spec.dataset, columns, robustness.contingency(biology, confounder) > 0)
    order = np.random.default_rng(settings.seed).permutation(len(biology))
    most = max(robustness.FEWEST_QUERIES, robustness.PAIRS // len(biology))
    probed, every = (
        np.sort(order[: settings.linear_rows]),
        robustness.combinations(biology, confounder, group, settings),
    )
    folds = [(confounder[probed], probed, min(settings.linear_folds, len(np.unique(group[probed]))))]
    if not too_small(every, group):
        folds.append((every[0].cell, every[0].rows, settings.folds))
    drawn = [draw_folds(y, group[at].astype(str).astype(object), k, settings.seed) for y, at, k in folds]
    return Cohort(
        dataset=spec.dataset,
        store=spec.store,
        biology_column=columns[0],
        confounder_column=columns[1],
        classes=classes,
        sites=sites,
        rows=rows[there],
        biology=biology,
        confounder=confounder,
        group=group,
        queries=np.sort(order[:most]),
        probed=probed,
        probe_fold=drawn[0],
        cell_fold=drawn[-1] if len(drawn) > 1 else probed[:0],
        combinations=tuple(every),
        digest=hashlib.sha256(repr([one.tolist() for one in kept]).encode()).hexdigest()[:16],
        remarks=tuple(remarks),
    )


def _complete(
    spec: DatasetSpec, rows: NDArray[np.int64], features: Sequence[Features], cells: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.bool_], list[str]]:
    """Return which of these rows have a value in each column and features of every model, and how many others are left
    out for what. Raises UserError if all are."""
    there, remarks = np.ones(len(rows), dtype=bool), []
    for name, cell in cells.items():
        valued = cell != None  # noqa: E711 - element by element
        if blank := int((~valued).sum()):
            of_label = " or of none of its classes" if name == spec.label else ""
            remarks.append(f"{counted(blank, 'row')} without {name}{of_label} left out")
        there &= valued
    for one in features:
        sound = one.sound("image", rows)
        if missing := int((there & ~sound).sum()):
            remarks.append(f"{counted(missing, 'row')} without features of {one.model} left out, for all models")
        there &= sound
    if not there.any():
        raise UserError(
            f"{spec.dataset}: no row has {', '.join(cells)} and features of every model "
            f"({', '.join(remarks)}); name columns that have values"
        )
    return there, remarks


def _check_crossed(dataset: str, columns: tuple[str, str], there: NDArray[np.bool_]) -> None:
    """Raise UserError if every site has one class, or every class one site. there: bool (C, S)."""
    of_site, of_class = (bool((there.sum(axis=axis) == 1).all()) for axis in (0, 1))
    if of_site or of_class:
        decided, by = columns[::-1] if of_class else columns
        raise UserError(
            f"{dataset}: {decided} is {'the same as' if of_site and of_class else 'decided by'} {by}, so that their "
            "effects cannot be told apart; name a column with classes at several sites and sites with several classes"
        )
