"""Rows whose features are examined for a class and a confounder: the same for all models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.base.text import cell_text, counted
from mmkd.evaluate import robustness
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.features import Features
from mmkd.evaluate.robustness import Codes, TrustSettings
from mmkd.store.layout import SOUND_BIT


@dataclass(frozen=True)
class Cohort:
    """Rows of a data set that all models have features of and that have both values. rows: grid rows, int64 (n,);
    biology, confounder, group: codes, int64 (n,). queries, probed: positions, int64, ascending, whose neighbors are
    searched and that the linear probe reads. remarks: what was left out."""

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
    digest: str
    remarks: tuple[str, ...]

    @property
    def table(self) -> NDArray[np.int64]:
        return robustness.contingency(self.biology, self.confounder)


def load_cohort(
    data: DatasetRows, features: Sequence[Features], columns: tuple[str, str], settings: TrustSettings
) -> Cohort:
    """Take the rows of all splits that have both values and features of every model. Raises UserError as
    `measure_trust`."""
    if not any(len(split) for split in data.splits.values()):
        data.split("test")  # raises
    samples = data.joined(tuple(name for name, split in data.splits.items() if len(split)))  # type: ignore[misc]
    rows, first = np.unique(samples.rows, return_index=True)
    group = data.groups(samples)[first]
    table = data.store.sample_table(columns=["row", *dict.fromkeys(columns)])
    at = np.searchsorted(table["row"].to_numpy(), rows)
    cells = [
        np.array([cell_text(value) for value in table[name].take(at).to_pylist()], dtype=object) for name in columns
    ]
    if columns[0] == data.spec.label:
        names = {value: data.classes[i] for value, i in data.class_of.items()}
        cells[0] = np.array([names.get(value) for value in cells[0]], dtype=object)
    remarks = []
    there = np.ones(len(rows), dtype=bool)
    for name, cell in zip(columns, cells, strict=True):
        if blank := int((cell == None).sum()):  # noqa: E711 - element by element
            of_label = " or of none of its classes" if name == data.spec.label else ""
            remarks.append(f"{counted(blank, 'row')} without {name}{of_label} left out")
        there &= cell != None  # noqa: E711
    for one in features:
        sound = np.logical_and.reduce(
            [(data.store.valid(slug)[rows] & SOUND_BIT["image"]) != 0 for slug in one.members]
        )
        if missing := int((there & ~sound).sum()):
            remarks.append(f"{counted(missing, 'row')} without features of {one.model} left out, for all models")
        there &= sound
    if not there.any():
        raise UserError(
            f"{data.spec.dataset}: no row has {columns[0]}, {columns[1]} and features of every model "
            f"({', '.join(remarks)}); name columns that have values"
        )
    coded = [np.unique(cell[there].astype(str), return_inverse=True) for cell in (*cells, group)]
    (classes, biology), (sites, confounder), (_, member) = coded
    kept = [one[there].tolist() for one in (samples.ids[first], *cells, group)]
    cohort = Cohort(
        dataset=data.spec.dataset,
        store=data.spec.store,
        biology_column=columns[0],
        confounder_column=columns[1],
        classes=tuple(classes.tolist()),
        sites=tuple(sites.tolist()),
        rows=rows[there],
        biology=biology.astype(np.int64),
        confounder=confounder.astype(np.int64),
        group=member.astype(np.int64),
        queries=np.empty(0, dtype=np.int64),
        probed=np.empty(0, dtype=np.int64),
        digest=hashlib.sha256(repr(kept).encode()).hexdigest()[:16],
        remarks=tuple(remarks),
    )
    _check(cohort)
    n = len(cohort.rows)
    most = max(robustness.FEWEST_QUERIES, robustness.PAIRS // n)
    order = np.random.default_rng(settings.seed).permutation(n)
    return replace(cohort, queries=np.sort(order[:most]), probed=np.sort(order[: settings.linear_rows]))


def _check(cohort: Cohort) -> None:
    for values, column in ((cohort.classes, cohort.biology_column), (cohort.sites, cohort.confounder_column)):
        if len(values) < 2:
            only = f"only the value {values[0]!r}" if values else "no value"
            raise UserError(f"{cohort.dataset}: {column} has {only} among the rows with features; expected two or more")
    if len(np.unique(cohort.group)) < 2:
        raise UserError(f"{cohort.dataset}: all rows are of one group; expected two or more patients")
    table = cohort.table > 0
    if (table.sum(axis=0) == 1).all() or (table.sum(axis=1) == 1).all():
        what = "the same as" if (table.sum(axis=0) == 1).all() and (table.sum(axis=1) == 1).all() else "decided by"
        one, other = cohort.confounder_column, cohort.biology_column
        if (table.sum(axis=1) == 1).all():
            one, other = other, one
        raise UserError(
            f"{cohort.dataset}: {other} is {what} {one}, so that their effects cannot be told apart; name a column "
            "with classes at several sites and sites with several classes"
        )
