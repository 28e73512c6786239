"""Robustness of features to a confounder such as the hospital, as PathoROB defines it (Koemen et al. 2026, "Towards
robust foundation models for digital pathology", Nature Communications 17:5218, and its code at 46594e9).

`biology` and `confounder` are int64 (n,), codes from 0; `group` is int64 (n,), the patient of every row, 0 to G - 1.
`counts` is float64 (B, G): how often each group occurs in each of B resamples; ones are the data themselves. Every
measure is float64 (B,), NaN where it has no value."""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats.contingency import crosstab
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmkd.base.arrays import Floats
from mmkd.base.config import Frozen
from mmkd.evaluate.linear_probe import Labeled, LinearProbeSettings, fit_chosen
from mmkd.evaluate.metrics import mean_of_defined, weighted_mean
from mmkd.evaluate.neighbors import Read

Codes = NDArray[np.int64]
PAIRS = 100_000_000
"""Pairs of query and row per model: all rows are queries up to 10,000; of 100,000 rows 1,000 are."""
FEWEST_QUERIES = 1000
MOST_NEIGHBORS = 301
LEAST_SHARE = 0.8
"""Of the sum of squared influences that the count of pairs leaves: the correction itself is uncertain with few groups.
In ten simulated designs of 30 to 200 patients, 95 % intervals then held the mean index of 500 studies in 94.6 to 97.2 %
of them; with 0.5 it was 89 to 97 %, without any correction up to 99 %."""
FEWEST_IN_CELL = 6
"""Groups that each cell of the generalization experiment needs: two for each of three folds."""


class TrustSettings(Frozen):
    """Constants of the measures; a results file states them."""

    k: int | None = None
    """Neighbors; by default the median over models of the k with the best k-NN balanced accuracy of biology."""
    combinations: int = 3
    """Pairs of classes x pairs of sites that are clustered, those with the most groups first."""
    clusters: tuple[int, int] = (2, 30)
    """Least and largest K of k-means; the best mean silhouette decides."""
    silhouette_inits: int = 3
    repeats: int = 10
    """Clusterings of each combination. PathoROB has 50, and 20 random starts to choose K."""
    inits: int = 5
    levels: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Cramer's V of class and site in the training rows; the first is the reference."""
    folds: int = 3
    cell_rows: int = 200
    """Rows of one class at one site that the generalization experiment and the clustering use at most."""
    linear_folds: int = 5
    linear_rows: int = 2000
    probe: LinearProbeSettings = LinearProbeSettings(c_low=1e-2, c_high=1e4, c_steps=7)
    seed: int = 0


def group_pairs(
    biology: Codes, confounder: Codes, queries: Codes, where: Codes, group: Codes
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Count what queries, int64 (q,), have among their neighbors `where`, int64 (q, k): SO, the Same class from an
    Other site, and OS, an Other class from the Same site. Each is (G, G), of the neighbor's and the query's group."""
    same_class, same_site = (code[queries, None] == code[where] for code in (biology, confounder))
    groups, found = int(group.max()) + 1, []
    for mask in (same_class & ~same_site, ~same_class & same_site):
        i, j = np.nonzero(mask)
        at = (group[where[i, j]], group[queries[i]])
        found.append(sparse.csr_array((np.ones(len(i)), at), shape=(groups, groups)))  # equal pairs are added up
    return found[0], found[1]


def robustness_index(pairs: tuple[sparse.csr_array, sparse.csr_array]) -> float:
    """Return SO / (SO + OS) of `group_pairs`. 1: only biology is near; 0: only the site. NaN without either."""
    favorable, adverse = (float(one.sum()) for one in pairs)
    return favorable / (favorable + adverse) if favorable + adverse else math.nan


def index_influence(pairs: tuple[sparse.csr_array, sparse.csr_array]) -> Floats:
    """Return what each group adds to the robustness index if it occurs once more, float64 (G,), as neighbor and as
    query: resampling queries alone would give half of the spread. Scaled so that the sum of squares is the variance of
    pairs that share a group, each counted once (Aronow, Samii and Assenova 2015, Political Analysis 23:564), or
    `LEAST_SHARE` of it with pairs counted twice."""
    share, groups = robustness_index(pairs), pairs[0].shape[0]
    if math.isnan(share):
        return np.zeros(groups)
    rest = ((1 - share) * pairs[0] - share * pairs[1]) / float(pairs[0].sum() + pairs[1].sum())
    both = rest + rest.T
    influence = np.asarray(both.sum(axis=1), dtype=np.float64)
    squares, twice = float(np.square(influence).sum()), float(both.multiply(both).sum()) / 2
    if squares == 0:
        return influence
    return influence * math.sqrt(max(1 - twice / squares, LEAST_SHARE) * groups / (groups - 1))


def chance_index(biology: Codes, confounder: Codes) -> float:
    """Return the robustness index that neighbors drawn at random would have."""
    table = contingency(biology, confounder)
    favorable = float((table * (table.sum(axis=1, keepdims=True) - table)).sum())
    adverse = float((table * (table.sum(axis=0, keepdims=True) - table)).sum())
    return favorable / (favorable + adverse)


def contingency(biology: Codes, confounder: Codes) -> NDArray[np.int64]:
    """Rows of every class at every site, of those that occur, int64 (C, S)."""
    return np.asarray(crosstab(biology, confounder).count, dtype=np.int64)


def linear_scores(features: NDArray[np.float32], y: Codes, fold: Codes) -> Floats:
    """Cross-validated probabilities of a logistic regression on standardized features by fold, int64 (n,): float64 (n,
    C), all NaN where a fold leaves one class to train on."""
    x, score = features.astype(np.float64), np.zeros((len(y), int(y.max()) + 1))
    for number in np.unique(fold):
        train, test = fold != number, fold == number
        if len(np.unique(y[train])) < 2:
            return np.full_like(score, np.nan)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[train], y[train])
        score[np.ix_(test, model.classes_)] = model.predict_proba(x[test])
    return score


@dataclass(frozen=True)
class Combination:
    """Two classes at two sites. rows: positions, int64 (m,); cell: int64 (m,), 2 * second class + second site."""

    classes: tuple[int, int]
    sites: tuple[int, int]
    rows: Codes
    cell: Codes


def combinations(biology: Codes, confounder: Codes, group: Codes, settings: TrustSettings) -> list[Combination]:
    """Return combinations of two classes at two sites whose four cells all have rows, those with the most groups in
    their smallest cell first. Of a cell at most `cell_rows` rows are drawn, the same for all models."""
    codes = [range(int(code.max()) + 1) for code in (biology, confounder)]
    cells = {one: np.flatnonzero((biology == one[0]) & (confounder == one[1])) for one in itertools.product(*codes)}
    sizes = {cell: len(np.unique(group[rows])) for cell, rows in cells.items()}
    pairs = [itertools.combinations(code, 2) for code in codes]
    ranked = [
        (-min(sizes[one] for one in itertools.product(classes, sites)), classes, sites)
        for classes, sites in itertools.product(*pairs)
    ]
    found = []
    for _, classes, sites in sorted(one for one in ranked if one[0])[: settings.combinations]:
        rng = np.random.default_rng([settings.seed, *classes, *sites])
        drawn = [
            np.sort(rng.permutation(cells[one])[: settings.cell_rows]) for one in itertools.product(classes, sites)
        ]
        number = np.repeat(np.arange(4), [len(rows) for rows in drawn]).astype(np.int64)
        found.append(Combination(classes, sites, np.concatenate(drawn), number))
    return found


def cluster(features: NDArray[np.float32], settings: TrustSettings) -> Codes:
    """Cluster unit features (m, D) by k-means: labels, int64 (repeats, m). K has the best mean silhouette by cosine."""
    distance = np.clip(1 - features @ features.T, 0, None).astype(np.float64)
    np.fill_diagonal(distance, 0)
    least, most = settings.clusters
    best, chosen = -np.inf, least
    for k in range(least, min(most, len(features) - 1) + 1):
        labels = _kmeans(features, k, settings.silhouette_inits, settings.seed)
        score = silhouette_score(distance, labels, metric="precomputed") if len(set(labels.tolist())) > 1 else -np.inf
        if score > best:
            best, chosen = float(score), k
    every = range(settings.seed, settings.seed + settings.repeats)
    return np.stack([_kmeans(features, chosen, settings.inits, seed) for seed in every])


def _kmeans(features: NDArray[np.float32], k: int, inits: int, seed: int) -> Codes:
    with warnings.catch_warnings():  # of copies: fewer different rows than clusters
        warnings.filterwarnings("ignore", message="Number of distinct clusters", category=ConvergenceWarning)
        labels = KMeans(k, init="random", n_init=inits, random_state=seed).fit(features).labels_
    return np.asarray(labels, dtype=np.int64)


def clustering_score(clusters: Codes, biology: Codes, confounder: Codes, weights: Floats) -> Floats:
    """Return the mean over clusterings, int64 (repeats, m), of the adjusted Rand index with biology minus that with the
    confounder. `weights`: float64 (B, m); copies of one row make no pairs with each other."""
    found = [rand_index(labels, biology, weights) - rand_index(labels, confounder, weights) for labels in clusters]
    return np.asarray(np.mean(found, axis=0))


def rand_index(one: Codes, other: Codes, weights: Floats) -> Floats:
    """Return the adjusted Rand index of two labelings (Hubert and Arabie 1985), from pairs of different rows."""
    itself = np.square(weights).sum(axis=1)

    def pairs(labels: Codes) -> Floats:
        hot = np.eye(int(labels.max()) + 1)[labels]
        return np.asarray((np.square(weights @ hot).sum(axis=1) - itself) / 2, dtype=np.float64)

    both, first, second = pairs(one * (int(other.max()) + 1) + other), pairs(one), pairs(other)
    expected = first * second / pairs(np.zeros_like(one))
    most = (first + second) / 2
    found: Floats = np.divide(both - expected, most - expected, out=np.ones(len(weights)), where=most != expected)
    return found


@dataclass(frozen=True)
class Generalization:
    """Which rows were classified right. right: float64 (levels, m), mean over both alignments; cell: int64 (m,), of
    which the mean is taken; rows: positions, int64 (m,)."""

    rows: Codes
    cell: Codes
    right: Floats

    def scores(self, group: Codes, counts: Floats) -> Floats:
        """Accuracy, the mean over cells, at every level: float64 (levels, B)."""
        weights = counts[:, group[self.rows]]
        cells = [self.cell == number for number in np.unique(self.cell)]
        means = [[weighted_mean(one[mask], weights[:, mask]) for mask in cells] for one in self.right]
        return np.stack([mean_of_defined(np.stack(one, axis=1)) for one in means])


def performance_drop(scores: Floats) -> Floats:
    """Return the mean over the levels with a correlation of score / score without one, minus 1: (levels, B) to (B,)."""
    return np.asarray((scores[1:] / scores[:1]).mean(axis=0) - 1)


def generalize(
    read: Read, chosen: Combination, fold: Codes, outside: Codes, biology: Codes, group: Codes, settings: TrustSettings
) -> tuple[Generalization, Generalization | None]:
    """Train on rows where class and site of a combination are correlated, test on groups that were not trained on, by
    `fold` of its rows: at both sites, and at those of `outside`, int64, rows of the two classes elsewhere (None where
    there are none).

    Level V trains on (1 + V) / 2 of m rows in each cell of one diagonal and (1 - V) / 2 of m in the others, in both
    alignments: 2 m rows at every level, m rows being what the smallest cell has. C is chosen inside the training rows,
    whose correlation the validation groups share, as a user would."""
    x, away = read(chosen.rows).astype(np.float64), read(outside).astype(np.float64)
    y, patient = chosen.cell // 2, group[chosen.rows]
    right = np.zeros((len(settings.levels), len(y)))
    right_away = np.zeros((len(settings.levels), len(outside)))
    truth_away = (biology[outside] == chosen.classes[1]).astype(np.int64)
    for number in range(settings.folds):
        order = _by_group(chosen.cell, patient, fold != number, settings.seed + number)
        for at, train in _training_rows(order, settings.levels):
            rows = Labeled(x[train], y[train], patient[train].astype(str).astype(object))
            model, _ = fit_chosen(rows, None, settings.probe, settings.seed)
            test = fold == number
            right[at, test] += (model.predict(x[test]) == y[test]) / 2
            if len(outside):
                right_away[at] += (model.predict(away) == truth_away) / (2 * settings.folds)
    return Generalization(chosen.rows, chosen.cell, right), (
        Generalization(outside, truth_away, right_away) if len(outside) else None
    )


def _by_group(cell: Codes, patient: Codes, usable: NDArray[np.bool_], seed: int) -> list[Codes]:
    """Usable rows of each of four cells, whole groups one after the other in random order."""
    rank = np.random.default_rng(seed).permutation(int(patient.max()) + 1)[patient]
    members = [np.flatnonzero((cell == number) & usable) for number in range(4)]
    return [rows[np.argsort(rank[rows], kind="stable")] for rows in members]


def _training_rows(order: list[Codes], levels: tuple[float, ...]) -> Iterator[tuple[int, Codes]]:
    """Yield number of the level and rows, for both alignments."""
    m = min(len(rows) for rows in order)
    for at, level in enumerate(levels):
        more, less = round(m * (1 + level) / 2), m - round(m * (1 + level) / 2)
        for sizes in ((more, less, less, more), (less, more, more, less)):
            yield at, np.concatenate([rows[:size] for rows, size in zip(order, sizes, strict=True)])
