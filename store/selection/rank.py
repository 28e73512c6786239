"""Whether a teacher finds the caption of an image, and the image of a caption, among random others."""

from __future__ import annotations

import numpy as np

from mmkd.store.layout import TOWERS, Tower
from mmkd.store.selection.block import TIE, Block, Columns, Floats, draw_rows, unit_rows
from mmkd.store.selection.rule import RankScore


class RankScorer:
    """Rank of the true partner among random ones."""

    def __init__(self, spec: RankScore, columns: Columns, seed: int) -> None:
        self.queries: list[tuple[Tower, Tower]] = []
        if spec.direction in ("both", "image_to_text"):
            self.queries.append(("image", "text"))
        if spec.direction in ("both", "text_to_image"):
            self.queries.append(("text", "image"))
        self.pools: list[dict[Tower, Floats]] = []
        for t, slug in enumerate(columns.slugs):
            rows = draw_rows(
                np.flatnonzero(columns.available[:, t]), spec.among, seed, f"rank among {spec.among} of teacher {slug}"
            )
            sound = np.ones(len(rows), dtype=bool)
            self.pools.append({tower: unit_rows(columns.store, slug, tower, rows, sound) for tower in TOWERS})

    def score(self, block: Block) -> Floats:
        """1 when nothing in the pool fits better, up to one more than the pool is large."""
        ranks = np.ones((len(block.sound), len(self.pools)), dtype=np.float32)
        for t, pool in enumerate(self.pools):
            true = np.einsum("nd,nd->n", block.unit(t, "image"), block.unit(t, "text"))
            for query, key in self.queries:
                better = block.unit(t, query) @ pool[key].T > (true + np.float32(TIE))[:, None]
                ranks[:, t] = np.maximum(ranks[:, t], 1 + np.count_nonzero(better, axis=1))
        return ranks
