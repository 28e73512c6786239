"""Rows with their place on the plane, as other tools for looking at embeddings take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from mmkd.store.inspect.projection import Method, project
from mmkd.store.inspect.rows import sample_rows
from mmkd.store.inspect.sampling import draw_inputs
from mmkd.store.layout import Tower

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

X, Y = "projection_x", "projection_y"


def atlas_table(
    store: FeatureStore, slug: str, tower: Tower, sample: int | None, seed: int = 0, method: Method = "pca"
) -> pa.Table:
    """Return sampled rows that have a sound feature: all columns of the sample table, then `projection_x` and
    `projection_y`. Raises UserError if there is no such teacher, an empty sample, or UMAP is not installed.

    Args:
        store: the store.
        slug: teacher whose space is drawn.
        tower: `image` or `text`.
        sample: rows to draw, of which those without a feature are left out; every row when None.
        seed: of the draw.
        method: see `project`.
    """
    found = project(store, slug, tower, draw_inputs(store, sample, seed), method, seed)
    table = sample_rows(store, found.rows)
    return table.append_column(X, pa.array(found.points[:, 0])).append_column(Y, pa.array(found.points[:, 1]))
