"""Agreement of two teachers on the same rows: linear CKA and mutual nearest neighbors. Both compare similarities
between rows and not the features themselves, so widths may differ and a rotation of a teacher's space changes
nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmkd.store.inspect.sampling import truly_sound, unit
from mmkd.store.layout import SOUND_BIT, Tower

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

NEIGHBOURS = 10

MIN_SHARED = 50
"""Rows that two teachers must share to be compared: with a handful, CKA is noise and every row is a neighbor."""


@dataclass(frozen=True)
class Agreement:
    """Teachers against teachers, on one tower."""

    tower: Tower
    teachers: tuple[str, ...]
    rows: NDArray[np.int64]
    """(T, T): rows that both have."""
    cka: NDArray[np.float64]
    """(T, T): unbiased linear CKA; 1 for equal up to rotation and scale, about 0 (either side) for unrelated ones,
    NaN where fewer than `MIN_SHARED` rows are shared."""
    mutual: NDArray[np.float64]
    """(T, T): mean share of the `k` nearest neighbors of a row that both teachers name; by chance k / (rows - 1). NaN
    as `cka`."""
    k: int


def agreement(store: FeatureStore, slugs: tuple[str, ...], tower: Tower, rows: NDArray[np.int64]) -> Agreement:
    """Compare every two teachers on the rows of `rows` that both have sound. Raises UserError if there is no such
    teacher.

    Args:
        store: the store.
        slugs: teachers.
        tower: `image` or `text`.
        rows: int64 (n,); similarities of n rows with each other are held for each teacher (float32 n x n, one at a
            time), so some thousands at most.
    """
    values: dict[str, NDArray[np.float32]] = {}
    sound: dict[str, NDArray[np.bool_]] = {}
    for slug in slugs:
        array = store.features(slug, tower)[rows]
        sound[slug] = (store.valid(slug)[rows] & SOUND_BIT[tower] != 0) & truly_sound(array)
        values[slug] = unit(array)
    count = len(slugs)
    shared = np.zeros((count, count), dtype=np.int64)
    cka, mutual = np.full((count, count), np.nan), np.full((count, count), np.nan)
    known: dict[tuple[str, bytes], tuple[NDArray[np.int64], float]] = {}
    for i, first in enumerate(slugs):
        for j in range(i, count):
            second = slugs[j]
            both = sound[first] & sound[second]
            shared[i, j] = shared[j, i] = np.count_nonzero(both)
            if shared[i, j] < MIN_SHARED:
                continue
            sides = []
            for slug in (first, second):
                # Of one teacher alone, and so the same against every other that has the same rows.
                key = slug, both.tobytes()
                if key not in known:
                    known[key] = nearest(values[slug][both], NEIGHBOURS), _own_hsic(values[slug][both])
                sides.append(known[key])
            (near, own), (other_near, other_own) = sides
            cka[i, j] = cka[j, i] = _cka(_hsic_of(values[first][both], values[second][both]), own, other_own)
            mutual[i, j] = mutual[j, i] = mutual_neighbours(near, other_near)
    return Agreement(tower, slugs, shared, cka, mutual, NEIGHBOURS)


def linear_cka(x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> float:
    """Return the linear CKA of rows x (n, D) and y (n, E) with the unbiased estimator of HSIC. CKA: Kornblith et al.,
    Similarity of Neural Network Representations Revisited, ICML 2019. The estimator: Song et al., Feature Selection via
    Dependence Maximization, JMLR 2012, equation 5; the usual one is biased towards 1 when n is not far above the
    widths. In terms of features, with a zero diagonal of the Gram matrices, nothing of size n x n is made. Returns
    about -0.1 to 1; NaN below four rows or when a side does not vary."""
    return _cka(_hsic_of(x, y), _own_hsic(x), _own_hsic(y)) if len(x) >= 4 else float("nan")


def _cka(both: float, own: float, other: float) -> float:
    scale = own * other
    return float(both / np.sqrt(scale)) if scale > 0 else float("nan")


def _own_hsic(x: NDArray[np.floating[Any]]) -> float:
    return _hsic_of(x, x)


def _hsic_of(x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> float:
    # The estimator does not change with a shift of the rows; small numbers keep its differences exact.
    a = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    return _hsic(a, a if y is x else y.astype(np.float64) - y.mean(axis=0, dtype=np.float64))


def _hsic(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    n = len(x)
    own_x, own_y = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
    sum_x, sum_y = x.sum(axis=0), y.sum(axis=0)
    row_x, row_y = x @ sum_x - own_x, y @ sum_y - own_y
    cross = x.T @ y
    trace = float((cross * cross).sum() - own_x @ own_y)
    product = (sum_x @ sum_x - own_x.sum()) * (sum_y @ sum_y - own_y.sum()) / ((n - 1) * (n - 2))
    return float((trace + product - 2.0 * (row_x @ row_y) / (n - 2)) / (n * (n - 3)))


def nearest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return indices (n, k) of each unit row's nearest others by cosine, in no order."""
    cosines = values @ values.T
    np.fill_diagonal(cosines, -np.inf)
    # A copy: a view would keep all n x n indices alive while the k that are wanted.
    found: NDArray[np.int64] = np.argpartition(cosines, -k, axis=1)[:, -k:].copy()
    return found


def mutual_neighbours(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Return mean share of common members of two (n, k) neighbor lists (Huh et al., The Platonic Representation
    Hypothesis, ICML 2024, appendix A)."""
    n, k = first.shape
    offset = np.arange(n)[:, None] * n
    common = np.intersect1d((first + offset).ravel(), (second + offset).ravel(), assume_unique=True)
    return float(len(common) / (n * k))
