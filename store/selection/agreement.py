"""Whether a teacher sees the neighbours that the other teachers see."""

from __future__ import annotations

import numpy as np

from mmkd.base.errors import UserError
from mmkd.store.selection.block import Block, Columns, Floats, Rows, draw_rows, unit_rows
from mmkd.store.selection.rule import AgreementScore


class AgreementScorer:
    """Mutual nearest neighbours with the other teachers."""

    def __init__(self, spec: AgreementScore, columns: Columns, seed: int) -> None:
        if len(columns.slugs) < 2:
            raise UserError(f"agreement needs two teachers or more, there is {columns.slugs[0]}")
        self.k, self.tower = spec.k, spec.tower
        what = f"agreement among {spec.among}"
        self.rows: Rows = draw_rows(np.flatnonzero(columns.available.all(axis=1)), spec.among, seed, what)
        sound = np.ones(len(self.rows), dtype=bool)
        self.pools = [unit_rows(columns.store, slug, spec.tower, self.rows, sound) for slug in columns.slugs]

    def score(self, block: Block) -> Floats:
        """Mean share of common neighbours, 0 to 1; 0 where no other teacher has the row."""
        sound = block.sound
        votes = np.zeros((len(sound), len(self.rows)), dtype=np.uint8)
        near = []
        here = np.flatnonzero((self.rows >= block.rows.start) & (self.rows < block.rows.stop))
        for t, pool in enumerate(self.pools):
            cosines = block.unit(t, self.tower) @ pool.T
            cosines[self.rows[here] - block.rows.start, here] = -np.inf  # a row is not its own neighbour
            # All that reach the k-th value: rows that tie with it are neighbours too, so no sort order has a say.
            least = np.partition(cosines, -self.k, axis=1)[:, -self.k]
            near.append((cosines >= least[:, None]) & sound[:, t, None])
            votes += near[-1]
        others = np.maximum(sound.sum(axis=1) - 1, 1)
        scores = np.zeros(sound.shape, dtype=np.float32)
        for t, mine in enumerate(near):
            # Without a teacher's own vote on each of its neighbours; without others nothing is shared.
            shared = (votes * mine).sum(axis=1, dtype=np.int64) - mine.sum(axis=1)
            scores[:, t] = np.minimum(shared / (self.k * others), 1)
        return scores
