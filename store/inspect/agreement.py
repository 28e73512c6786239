"""Agreement of two teachers on the same rows: linear CKA and mutual nearest neighbors. Both compare similarities
between rows, not the features themselves: widths may differ, and rotating a teacher's space changes nothing."""

from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.arrays import Bools, Floats, Ints, Singles
from mmkd.store.inspect.sampling import truly_sound, unit
from mmkd.store.layout import SOUND_BIT, Tower
from mmkd.store.reader import FeatureStore

NEIGHBORS = 10
MIN_SHARED = 50
"""Rows that two teachers must share to be compared: with a handful, CKA is noise and every row is a neighbor."""


@dataclass(frozen=True)
class Agreement:
    """Teachers against teachers, on one tower."""

    tower: Tower
    teachers: tuple[str, ...]
    rows: Ints
    """(T, T): rows that both have."""
    cka: Floats
    """(T, T): unbiased linear CKA; 1 for equal up to rotation and scale, about 0 (either side) for unrelated ones,
    NaN where fewer than `MIN_SHARED` rows are shared."""
    mutual: Floats
    """(T, T): mean share of a row's `k` nearest neighbors that both teachers name; by chance k / (rows - 1). NaN as
    `cka`."""
    k: int

    @property
    def compared(self) -> bool:
        """True when two different teachers share enough rows."""
        return bool(np.isfinite(self.cka[np.triu_indices(len(self.teachers), 1)]).any())


def agreement(store: FeatureStore, slugs: tuple[str, ...], tower: Tower, rows: Ints) -> Agreement:
    """Compare every two teachers on those of `rows`, int64 (n,), that are sound in both. The similarities of n rows
    with each other are held for one teacher at a time (float32 n x n): some thousands of rows at most. Raises UserError
    if there is no such teacher."""
    values: dict[str, Singles] = {}
    sound: dict[str, Bools] = {}
    for slug in slugs:
        array = store.features(slug, tower)[rows]
        sound[slug] = (store.valid(slug)[rows] & SOUND_BIT[tower] != 0) & truly_sound(array)
        values[slug] = unit(array)

    @cache  # the same against every other teacher that has the same rows
    def neighbors_and_hsic(slug: str, chosen: bytes) -> tuple[Ints, float]:
        own = values[slug][np.frombuffer(chosen, dtype=np.bool_)]
        return nearest(own, NEIGHBORS), hsic(own, own)

    count = len(slugs)
    shared = np.zeros((count, count), dtype=np.int64)
    cka, mutual = np.full((count, count), np.nan), np.full((count, count), np.nan)
    for i, j in combinations_with_replacement(range(count), 2):
        both = sound[slugs[i]] & sound[slugs[j]]
        shared[i, j] = shared[j, i] = np.count_nonzero(both)
        if shared[i, j] >= MIN_SHARED:
            near, own = neighbors_and_hsic(slugs[i], both.tobytes())
            other_near, other_own = neighbors_and_hsic(slugs[j], both.tobytes())
            cka[i, j] = cka[j, i] = cka_of(hsic(values[slugs[i]][both], values[slugs[j]][both]), own, other_own)
            mutual[i, j] = mutual[j, i] = mutual_neighbors(near, other_near)
    return Agreement(tower, slugs, shared, cka, mutual, NEIGHBORS)


def cka_of(both: float, own: float, other: float) -> float:
    """Return linear CKA, about -0.1 to 1, from the HSIC of two sets of rows with each other and with themselves; NaN
    when one does not vary (Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019)."""
    return float(both / np.sqrt(own * other)) if own * other > 0 else float("nan")


def hsic(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """Return the unbiased HSIC of rows (n, D) and (n, E), n of four or more, in terms of features, so that nothing of
    size n x n is made: Song et al., Feature Selection via Dependence Maximization, JMLR 2012, equation 5. The usual
    estimator is biased, and CKA towards 1, when n is not far above the widths."""
    # Centering changes nothing but the rounding: small numbers keep the estimator's differences exact.
    x, y = (side.astype(np.float64) - side.mean(axis=0, dtype=np.float64) for side in (first, second))
    n = len(x)
    own_x, own_y = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
    sum_x, sum_y = x.sum(axis=0), y.sum(axis=0)
    row_x, row_y = x @ sum_x - own_x, y @ sum_y - own_y
    cross = x.T @ y
    trace = float((cross * cross).sum() - own_x @ own_y)
    product = (sum_x @ sum_x - own_x.sum()) * (sum_y @ sum_y - own_y.sum()) / ((n - 1) * (n - 2))
    return float((trace + product - 2.0 * (row_x @ row_y) / (n - 2)) / (n * (n - 3)))


def nearest(values: Singles, k: int) -> Ints:
    """Return indices (n, k) of each unit row's nearest others by cosine, in no order."""
    cosines = values @ values.T
    np.fill_diagonal(cosines, -np.inf)
    # A copy: a view would keep all n x n indices in memory.
    return np.argpartition(cosines, -k, axis=1)[:, -k:].copy()


def mutual_neighbors(first: Ints, second: Ints) -> float:
    """Return the mean share of common members of two (n, k) neighbor lists (Huh et al., The Platonic Representation
    Hypothesis, ICML 2024, appendix A)."""
    n, k = first.shape
    offset = np.arange(n)[:, None] * n
    common = np.intersect1d((first + offset).ravel(), (second + offset).ravel(), assume_unique=True)
    return float(len(common) / (n * k))
