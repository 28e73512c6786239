"""What one pass over a model's features gives, and its measures with resamples of patients."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # a dependency of scikit-learn

from mmkd.base.arrays import Floats
from mmkd.base.errors import UserError
from mmkd.evaluate import metrics, robustness
from mmkd.evaluate.features import Features
from mmkd.evaluate.neighbors import blocks_of, nearest_rows, shares_of_votes
from mmkd.evaluate.robustness import Codes, Combination, Generalization, TrustSettings
from mmkd.evaluate.scoring import BootstrapSettings, group_counts
from mmkd.evaluate.statistics import Replicates, rarer_groups
from mmkd.evaluate.trust_cohort import NO_CELLS, Cohort
from mmkd.store import FeatureStore

Score = Callable[[Floats], Floats]
"""Counts of groups (B, G) to values (B,)."""
Measure = tuple[str, Score | str, Codes, list[Codes]]
"""Name, score or why there is none, rows, and codes of them that an interval needs several groups of."""
ELEMENTS = 1 << 22
"""Counts held at a time: 32 MiB."""


@dataclass(frozen=True)
class Findings:
    """What one pass over a model's features gives, before k is chosen."""

    where: Codes
    linear: Floats
    clusters: tuple[Codes, ...]
    here: Generalization | None
    elsewhere: Generalization | None


def examine(store: str, model: str, members: tuple[str, ...], cohort: Cohort, settings: TrustSettings) -> Findings:
    """Everything that needs a model's features, on one thread of BLAS."""
    features = Features(FeatureStore.open(store), model, members)

    def read(positions: Codes) -> NDArray[np.float32]:
        block = features.images(cohort.rows[positions])
        if not block.available.all():
            row = cohort.rows[positions[~block.available][0]]
            raise UserError(
                f"{cohort.dataset}: {model} has a feature of length 0 or infinite in row {row}; extract it again"
            )
        return block.values

    with threadpool_limits(1):
        k = min(max(robustness.MOST_NEIGHBORS, settings.k or 0), len(cohort.rows) - 1)
        blocks, group = blocks_of(read, len(cohort.rows)), cohort.group
        where, _ = nearest_rows(read(cohort.queries), blocks, k, group[cohort.queries], group)
        rows = cohort.probed
        linear = robustness.linear_scores(read(rows), cohort.confounder[rows], cohort.probe_fold)
        clusters = tuple(robustness.cluster(read(one.rows), settings) for one in cohort.combinations)
        here = elsewhere = None
        if not cohort.too_small:
            first = cohort.combinations[0]
            outside = _outside(cohort, first, settings)
            here, elsewhere = robustness.generalize(
                read, first, cohort.cell_fold, outside, cohort.biology, cohort.group, settings
            )
    return Findings(where, linear, clusters, here, elsewhere)


def _outside(cohort: Cohort, one: Combination, settings: TrustSettings) -> Codes:
    """Rows of the two classes at other sites, of groups that the combination does not hold; a seeded draw."""
    elsewhere = np.isin(cohort.biology, one.classes) & ~np.isin(cohort.confounder, one.sites)
    rows = np.flatnonzero(elsewhere & ~np.isin(cohort.group, cohort.group[one.rows]))
    if len(set(cohort.biology[rows].tolist())) < 2:
        return np.empty(0, dtype=np.int64)
    return np.sort(np.random.default_rng(settings.seed).permutation(rows)[: 4 * settings.cell_rows])


def curve_of(cohort: Cohort, found: Findings, ks: list[int]) -> tuple[tuple[int, float, float, float], ...]:
    """Of every k: robustness index, k-NN balanced accuracy of the class and of the confounder."""
    once = np.ones((1, len(cohort.queries)))
    accuracies = []
    for code in (cohort.biology, cohort.confounder):
        votes = shares_of_votes(code, found.where, ks, int(code.max()) + 1)
        accuracies.append([float(metrics.balanced_accuracy(code[cohort.queries], one, once)[0]) for one in votes])
    same_class, same_site = (
        code[cohort.queries, None] == code[found.where] for code in (cohort.biology, cohort.confounder)
    )
    favorable, adverse = (
        np.cumsum(mask.sum(axis=0))[np.array(ks) - 1] for mask in (same_class & ~same_site, ~same_class & same_site)
    )
    index = np.divide(favorable, favorable + adverse, out=np.full(len(ks), np.nan), where=favorable + adverse > 0)
    return tuple(zip(ks, index.tolist(), *accuracies, strict=True))


def drop_of(cohort: Cohort, found: Findings, settings: TrustSettings) -> tuple[tuple[float, float, float], ...]:
    """Of every level: Cramer's V in training, accuracy at the same sites, accuracy at others; nothing if not tried."""
    if found.here is None:
        return ()
    once, none = np.ones((1, int(cohort.group.max()) + 1)), np.full(len(settings.levels), np.nan)
    sides = (none if one is None else one.scores(cohort.group, once)[:, 0] for one in (found.here, found.elsewhere))
    return tuple(zip(settings.levels, *(one.tolist() for one in sides), strict=True))


def replicates_of(
    measures: Sequence[Measure], group: Codes, bootstrap: BootstrapSettings, word: list[int]
) -> list[Replicates]:
    """Value and resamples of every measure; resamples are drawn once for all, and few are held at a time."""
    groups, found = int(group.max()) + 1, []
    for counts in itertools.chain([np.ones((1, groups))], group_counts(np.arange(groups), bootstrap.n, word)):
        none = np.full(len(counts), np.nan)
        found.append([none if isinstance(score, str) else score(counts) for _, score, *_ in measures])
    every = [np.concatenate(blocks) for blocks in zip(*found, strict=True)]
    return [_replicates(measure, values, group) for measure, values in zip(measures, every, strict=True)]


def _replicates(measure: Measure, values: Floats, group: Codes) -> Replicates:
    """values: of all groups, then of the resamples. An interval needs groups on both sides of each of its codes."""
    _, score, rows, codes = measure
    sides = [rarer_groups(group[rows], [(code == one, code != one) for one in np.unique(code)]) for code in codes]
    return Replicates(
        value=float(values[0]),
        draws=values[1:],
        n=len(rows),
        groups=len(np.unique(group[rows])),
        missing=0,
        limits=(-1.5, 1.5),  # finite, so that resamples that are all equal give no interval
        reason=score if isinstance(score, str) else "",
        contrast=min((side for side in sides if side is not None), default=0),
    )


def scores_of(cohort: Cohort, found: Findings, k: int) -> Iterator[Measure]:
    """Yield every measure of a model, k-NN of the first k neighbors."""
    yield from _of_neighbors(cohort, found.where[:, :k])
    yield from _of_probe(cohort, found)
    yield from _of_combinations(cohort, found)


def _weighted(cohort: Cohort, rows: Codes, metric: Callable[..., Floats], *of: NDArray[Any]) -> Score:
    """A metric of `rows`, weighted by how often their groups occur."""
    return lambda counts: metric(*of, counts[:, cohort.group[rows]])


def _of_neighbors(cohort: Cohort, where: Codes) -> Iterator[Measure]:
    queries, codes = cohort.queries, (cohort.biology, cohort.confounder)
    pairs = robustness.group_pairs(*codes, queries, where, cohort.group)
    index, influence = robustness.robustness_index(pairs), robustness.index_influence(pairs)
    none = "no neighbor of the same class elsewhere, nor of another class here; try a larger --k"
    linear = none if math.isnan(index) else lambda counts: index + (counts - 1) @ influence
    yield "robustness_index", linear, queries, [code[queries] for code in codes]
    for name, code in zip(("knn_biology", "knn_confounder"), codes, strict=True):
        (votes,), y = shares_of_votes(code, where, [where.shape[1]], int(code.max()) + 1), code[queries]
        yield name, _weighted(cohort, queries, metrics.balanced_accuracy, y, votes), queries, [y]


def _of_probe(cohort: Cohort, found: Findings) -> Iterator[Measure]:
    rows, y = cohort.probed, cohort.confounder[cohort.probed]
    few = "a fold of the cross-validation has one site only" if np.isnan(found.linear).any() else ""

    def fold_auroc(counts: Floats) -> Floats:
        masks = [cohort.probe_fold == number for number in np.unique(cohort.probe_fold)]
        weights = counts[:, cohort.group[rows]]
        areas = [metrics.macro_auroc(y[one], found.linear[one], weights[:, one]) for one in masks]
        return metrics.mean_of_defined(np.stack(areas, axis=1))

    yield "linear_confounder", few or _weighted(cohort, rows, metrics.balanced_accuracy, y, found.linear), rows, [y]
    yield "linear_confounder_auroc", few or fold_auroc, rows, [y]


def _of_combinations(cohort: Cohort, found: Findings) -> Iterator[Measure]:
    codes, every = (cohort.biology, cohort.confounder), cohort.combinations
    rows = np.unique(np.concatenate([cohort.queries[:0], *(one.rows for one in every)]))
    members = np.unique(cohort.group[rows])

    def clustered(counts: Floats) -> Floats:
        weights = [counts[:, np.searchsorted(members, cohort.group[one.rows])] for one in every]
        of = [
            robustness.clustering_score(labels, one.cell // 2, one.cell % 2, weight)
            for one, labels, weight in zip(every, found.clusters, weights, strict=True)
        ]
        return np.asarray(np.mean(of, axis=0))

    score = jackknifed(clustered, members) if every else NO_CELLS
    yield "clustering_score", score, rows, [code[rows] for code in codes]
    away_reason = cohort.too_small or "no rows of both classes at other sites"
    for name, one, reason, measure in (
        ("accuracy_uncorrelated", found.here, cohort.too_small, lambda scores: scores[0]),
        ("accuracy_correlated", found.here, cohort.too_small, lambda scores: scores[-1]),
        ("performance_drop", found.here, cohort.too_small, robustness.performance_drop),
        ("performance_drop_elsewhere", found.elsewhere, away_reason, robustness.performance_drop),
    ):
        if one is None:
            yield name, reason, cohort.queries[:0], []
        else:
            yield name, partial(_of_levels, one, cohort.group, measure), one.rows, [one.cell]


def jackknifed(score: Score, members: Codes) -> Score:
    """Return the value of `score`, of counts of the groups `members` (B, M), plus what each adds by the jackknife
    (Efron 1982), linear in the counts: a measure of pairs is biased in resamples, where pairs within a group are too
    many."""
    n = len(members)

    def without(some: Codes) -> Floats:
        counts = np.ones((len(some), n))
        counts[np.arange(len(some)), some] = 0
        return score(counts)

    blocks = np.array_split(np.arange(n), -(-n * n // ELEMENTS))  # a few at a time: all would be gigabytes
    value, others = float(score(np.ones((1, n)))[0]), np.concatenate([without(some) for some in blocks])
    influence = (np.mean(others) - others) * math.sqrt((n - 1) / n)
    return lambda counts: value + (counts[:, members] - 1) @ influence


def _of_levels(one: Generalization, group: Codes, measure: Callable[[Floats], Floats], counts: Floats) -> Floats:
    return measure(one.scores(group, counts))
