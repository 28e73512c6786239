"""Teachers' stored features as the losses want them: aligned, of unit norm, masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmkd.distill.alignment import Alignment
from mmkd.distill.batch import TeacherTargets
from mmkd.distill.losses import PairFeatures, unit


@dataclass(frozen=True)
class Preparation:
    """Preparation of a teacher's features before they meet the student's."""

    slugs: tuple[str, ...]
    alignment: Alignment | None
    to_unit: bool

    def __call__(self, targets: Sequence[TeacherTargets], group: torch.Tensor) -> list[PairFeatures]:
        """Rows of every teacher, float32 (B, A), in the order of the run's teachers."""
        return [
            PairFeatures(
                self._tower(slug, "image", target.image), self._tower(slug, "text", target.text), group, target.present
            )
            for slug, target in zip(self.slugs, targets, strict=True)
        ]

    def _tower(self, slug: str, tower: str, features: torch.Tensor) -> torch.Tensor:
        values = features.float()
        if self.alignment is not None:
            values = self.alignment(slug, tower, values)
        return unit(values) if self.to_unit else values


def mixed(prepared: Sequence[PairFeatures], shares_BT: torch.Tensor) -> PairFeatures:
    """One set of rows, each of the teacher that has all of its share; a row without a teacher is not available."""
    image, text = (torch.stack([getattr(pairs, tower) for pairs in prepared], dim=1) for tower in ("image", "text"))
    chosen = shares_BT.argmax(dim=1)[:, None, None].expand(-1, 1, image.shape[2])
    return PairFeatures(
        image.gather(1, chosen)[:, 0], text.gather(1, chosen)[:, 0], prepared[0].group, shares_BT.sum(1) > 0
    )
