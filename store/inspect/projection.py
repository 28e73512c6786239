"""A sample of rows on a plane: PCA, or UMAP where its package is installed."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from mmkd.base.arrays import Ints, Singles
from mmkd.base.install import import_extra
from mmkd.store.inspect.rows import sample_rows
from mmkd.store.inspect.sampling import draw_inputs, truly_sound, unit
from mmkd.store.layout import SOUND_BIT, Tower
from mmkd.store.reader import FeatureStore

Method = Literal["pca", "umap"]
X, Y = "projection_x", "projection_y"


@dataclass(frozen=True)
class Projection:
    """Positions of rows on a plane."""

    slug: str
    tower: Tower
    method: Method
    rows: Ints
    points: Singles
    """(n, 2); `rows` (n,): those of the sample that have a sound feature."""
    explained: float | None
    """Share of the variance that the two axes hold; None for UMAP, whose axes mean nothing."""


def project(
    store: FeatureStore, slug: str, tower: Tower, rows: Ints, method: Method = "pca", seed: int = 0
) -> Projection:
    """Project the sound unit features of `rows`, int64 (n,) ascending. `umap` keeps neighborhoods and depends on
    `seed`. Raises UserError for an unknown teacher, or if UMAP is not installed."""
    array = store.features(slug, tower)
    rows = rows[store.valid(slug)[rows] & SOUND_BIT[tower] != 0]
    rows = rows[truly_sound(array[rows])]
    values = unit(array[rows])
    if method == "umap" and len(rows) > 3:
        return Projection(slug, tower, method, rows, _umap(values, seed), None)
    points, explained = principal_axes(values)
    return Projection(slug, tower, "pca", rows, points, explained)


def principal_axes(values: Singles) -> tuple[Singles, float]:
    """Return points (n, 2) on the principal axes of rows (n, D), and their share of the variance. The largest
    coordinate of an axis is made positive, so that pages can be compared."""
    if len(values) < 2:
        return np.zeros((len(values), 2), dtype=np.float32), 1.0
    centered = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    sizes, axes = np.linalg.eigh(centered.T @ centered)
    plane = axes[:, ::-1][:, :2]
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    plane = plane * np.where(plane[np.abs(plane).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    total = float(sizes.sum())
    return (centered @ plane).astype(np.float32), float(sizes[-2:].sum()) / total if total > 0 else 1.0


def _umap(values: Singles, seed: int) -> Singles:
    umap = import_extra("umap", "umap", "UMAP", ", or use PCA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from numba, and that a fixed seed costs threads: known and meant
        neighbors = min(15, len(values) - 1)
        init = "spectral" if len(values) > 50 else "random"
        fitted = umap.UMAP(n_neighbors=neighbors, metric="cosine", random_state=seed, n_jobs=1, init=init)
        return np.asarray(fitted.fit_transform(values))


def atlas_table(
    store: FeatureStore, slug: str, tower: Tower, sample: int | None, seed: int = 0, method: Method = "pca"
) -> pa.Table:
    """Return those of `sample` rows (None: all) that have a sound feature: all sample columns, `projection_x` and
    `projection_y`. Raises UserError as `project`, and for an empty sample."""
    found = project(store, slug, tower, draw_inputs(store, sample, seed), method, seed)
    table = sample_rows(store, found.rows)
    return table.append_column(X, pa.array(found.points[:, 0])).append_column(Y, pa.array(found.points[:, 1]))
