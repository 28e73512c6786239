"""Can an encoder be trusted: how far its features follow a class and how far a confounder such as the hospital."""

import importlib.metadata
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
from scipy.stats.contingency import association

from mmkd.base.errors import UserError
from mmkd.base.text import counted, one_line, plain_values, table_lines
from mmkd.evaluate import robustness
from mmkd.evaluate.dataset import load_dataset
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.plan import model_names
from mmkd.evaluate.results import code_digest
from mmkd.evaluate.robustness import TrustSettings
from mmkd.evaluate.scoring import BootstrapSettings, name_words
from mmkd.evaluate.statistics import TOLERANCE, Difference, Replicates, holm, interval_text, paired_difference
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.trust_cohort import Cohort, load_cohort
from mmkd.evaluate.trust_measures import Findings, curve_of, drop_of, examine, replicates_of, scores_of
from mmkd.store import FeatureStore

SCHEMA, VERSION = "mmkd.trust", 1
MEASURES = {
    "robustness_index": ("robustness index", True),
    "knn_biology": ("k-NN balanced accuracy of the class", True),
    "knn_confounder": ("k-NN balanced accuracy of the confounder", False),
    "linear_confounder": ("linear probe of the confounder, balanced accuracy", False),
    "linear_confounder_auroc": ("linear probe of the confounder, AUROC", False),
    "clustering_score": ("clustering score", True),
    "accuracy_uncorrelated": ("accuracy, class and site uncorrelated in training", True),
    "accuracy_correlated": ("accuracy, fully correlated in training", True),
    "performance_drop": ("average performance drop, same sites", True),
    "performance_drop_elsewhere": ("average performance drop, other sites", True),
}
"""Measure to its title, and whether higher is better."""


@dataclass(frozen=True)
class ModelTrust:
    """One model. measures: by name. k_best: of the model alone. curve: (k, robustness index, accuracy of the class, of
    the confounder). drop: (Cramer's V, accuracy at the same sites, at others or NaN)."""

    model: str
    features_digest: str
    measures: dict[str, Replicates]
    k_best: int
    curve: tuple[tuple[int, float, float, float], ...]
    drop: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class TrustReport:
    """All models on one data set, paired on the same rows and resamples."""

    suite: str
    suite_version: int
    cohort: Cohort
    k: int
    chance: float
    bootstrap: BootstrapSettings
    settings: TrustSettings
    models: tuple[ModelTrust, ...]
    remarks: tuple[str, ...] = field(default=())

    def interval(self, one: Replicates) -> tuple[float, float]:
        return one.interval(self.bootstrap.level)

    def shown(self, one: Replicates) -> str:
        return interval_text(one.value, *self.interval(one), ".3f")

    def rank(self, model: str, name: str) -> str:
        """Return 1 plus the number of models with a better value, `-` without one."""
        sign = 1 if MEASURES[name][1] else -1
        values = {one.model: sign * one.measures[name].value for one in self.models}
        own = values[model]
        return "-" if math.isnan(own) else str(1 + sum(value > own + TOLERANCE for value in values.values()))

    def differences(self, model: str) -> list[tuple[str, str, Difference, float]]:
        """Return measure, rival, difference of the model to the rival, and p after Holm over the rivals."""
        own = next(one for one in self.models if one.model == model)
        found = []
        for name in MEASURES:
            rivals = [one for one in self.models if one.model != model]
            pairs = [paired_difference(own.measures[name], one.measures[name], self.bootstrap.level) for one in rivals]
            adjusted = holm([one.p for one in pairs])
            found += [(name, rival.model, one, p) for rival, one, p in zip(rivals, pairs, adjusted, strict=True)]
        return found

    def text(self) -> str:
        c = self.cohort
        lines = [
            f"{c.dataset}: {c.biology_column} ({len(c.classes)} classes) against {c.confounder_column} ({len(c.sites)} "
            f"sites); {counted(len(c.rows), 'row')}, {counted(int(c.group.max()) + 1, 'group')}, "
            f"{len(c.queries):,} queries, k = {self.k}, chance index {self.chance:.3f}"
        ]
        shown = [name for name in MEASURES if any(math.isfinite(one.measures[name].value) for one in self.models)]
        lines += table_lines(
            ["model", *shown], [[one.model, *(self.shown(one.measures[name]) for name in shown)] for one in self.models]
        )
        return "\n".join(map(one_line, [*lines, *(f"  {remark}" for remark in self.remarks)]))

    def as_json(self) -> str:
        c = self.cohort
        content = {
            "schema": SCHEMA, "version": VERSION, "suite": self.suite, "suite_version": self.suite_version,
            "dataset": c.dataset, "biology": c.biology_column, "confounder": c.confounder_column,
            "classes": c.classes, "sites": c.sites, "rows_of_class_at_site": c.table, "k": self.k,
            "chance_index": self.chance, "queries": len(c.queries), "data_digest": c.digest,
            "code_digest": code_digest(), "code_version": importlib.metadata.version("mmkd"),
            "bootstrap": self.bootstrap.model_dump(), "settings": self.settings.model_dump(), "remarks": self.remarks,
            "models": [
                {
                    "model": one.model, "features_digest": one.features_digest, "k_best": one.k_best,
                    "measures": {name: self._cell(found) for name, found in one.measures.items()},
                    "curve": one.curve, "drop": one.drop,
                }
                for one in self.models
            ],
        }  # fmt: skip
        return json.dumps(plain_values(content), indent=1) + "\n"

    def _cell(self, one: Replicates) -> dict[str, Any]:
        low, high = self.interval(one)
        return {"value": one.value, "low": low, "high": high, "n": one.n, "groups": one.groups, "reason": one.reason}


def measure_trust(
    suite: Suite,
    biology: str,
    confounder: str,
    settings: TrustSettings | None = None,
    *,
    dataset: str | None = None,
    jobs: int = 1,
) -> list[TrustReport]:
    """Measure every model of a suite on each data set with both columns, or on one. Raises UserError where no data set
    has them, a column has one value only, or nothing but the confounder tells classes apart."""
    chosen = settings or TrustSettings()
    if biology == confounder:
        raise UserError(f"biology and confounder are both {biology!r}; name two different columns")
    reports, without = [], []
    for spec in suite.chosen(dataset):
        store = FeatureStore.open(spec.store)
        known = store.samples.schema.names
        if absent := [name for name in (biology, confounder) if name not in known]:
            without.append(f"{spec.dataset} has no column {absent[0]!r}, only {', '.join(known)}")
        else:
            reports.append(_measure_dataset(suite, spec, store, (biology, confounder), chosen, jobs))
    if not reports:
        raise UserError("; ".join(without))
    return [replace(one, remarks=(*one.remarks, *without)) for one in reports]


def _measure_dataset(
    suite: Suite, spec: DatasetSpec, store: FeatureStore, columns: tuple[str, str], settings: TrustSettings, jobs: int
) -> TrustReport:
    data = load_dataset(spec, store, columns)
    models = model_names(suite, [store])
    features = [Features(store, model, suite.ensembles.get(model, ())) for model in models]
    cohort = load_cohort(data, features, columns, settings)
    tasks = [(spec.store, one.model, one.members, cohort, settings) for one in features]
    if jobs == 1 or len(tasks) == 1:
        found = [examine(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as pool:
            found = [one.result() for one in [pool.submit(examine, *task) for task in tasks]]
    most = min(int((one.where >= 0).sum(axis=1).min()) for one in found)
    ks = [k for k in (1, 3, 5, 7, 9, *range(11, robustness.MOST_NEIGHBORS + 1, 10)) if k <= most]
    if not ks:
        raise UserError(f"{spec.dataset}: some rows have no row of another group as neighbor; expected two groups")
    curves = [curve_of(cohort, one, ks) for one in found]
    best = [ks[int(np.argmax([point[2] for point in curve]))] for curve in curves]
    k = settings.k or int(np.median(best))
    if k > found[0].where.shape[1]:
        raise UserError(f"{spec.dataset}: k is {k}, but there are {found[0].where.shape[1]} neighbors at most")
    word = [suite.bootstrap.seed, *name_words(f"{suite.resample_name(spec.dataset)}/trust")]
    scored = [list(scores_of(cohort, what, k)) for what in found]
    drawn = iter(replicates_of([one for every in scored for one in every], cohort.group, suite.bootstrap, word))
    results = [
        ModelTrust(
            one.model, one.digest(cohort.rows), {name: next(drawn) for name, *_ in every}, own, curve,
            drop_of(cohort, what, settings),
        )
        for one, what, every, curve, own in zip(features, found, scored, curves, best, strict=True)
    ]  # fmt: skip
    chance = robustness.chance_index(cohort.biology, cohort.confounder)
    remarks = [*cohort.remarks, *_remarks(cohort, found, spec)]
    return TrustReport(
        suite.suite, suite.version, cohort, k, chance, suite.bootstrap, settings, tuple(results), tuple(remarks)
    )


def _remarks(cohort: Cohort, found: Sequence[Findings], spec: DatasetSpec) -> Iterator[str]:
    table = cohort.table
    if spec.group is None:
        yield "the set has no `group`: rows of one patient count as independent, and as each other's neighbors"
    if len(cohort.queries) < len(cohort.rows):
        yield f"neighbors of {len(cohort.queries):,} drawn rows, among all {len(cohort.rows):,}"
    v = association(table, method="cramer")
    yield f"Cramer's V of {cohort.biology_column} and {cohort.confounder_column} in these rows is {v:.2f}"
    if table.min() != table.max():
        yield "cells of class and site differ in size; compare the robustness index with its chance value, not with 0.5"
    total = math.comb(len(cohort.classes), 2) * math.comb(len(cohort.sites), 2)
    if every := cohort.combinations:
        yield f"clustering score of {len(every)} of {total} combinations of two classes and two sites"
        if found[0].here is not None:
            classes = " and ".join(cohort.classes[one] for one in every[0].classes)
            sites = " and ".join(cohort.sites[one] for one in every[0].sites)
            yield f"generalization: {classes} at {sites}; its intervals hold for the probes as trained"
