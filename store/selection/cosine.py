"""How well a teacher thinks that image and caption fit: their cosine."""

from __future__ import annotations

import numpy as np

from mmkd.store.selection.block import Block, Columns, Floats
from mmkd.store.selection.rule import CosineScore


class CosineScorer:
    """Cosine of image and caption."""

    def __init__(self, spec: CosineScore, columns: Columns, seed: int) -> None:
        self.teachers = len(columns.slugs)

    def score(self, block: Block) -> Floats:
        """Cosines in [-1, 1]."""
        towers = ((block.unit(t, "image"), block.unit(t, "text")) for t in range(self.teachers))
        return np.stack([np.einsum("nd,nd->n", image, text) for image, text in towers], axis=1)
