"""Where student and teachers meet: a fixed map of a teacher's features, then a learned one of the student's. Shapes: B
rows, D student width, E teacher width, A width of the comparison (E, or the alignment's), T teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmkd.base.errors import ConfigError
from mmkd.distill.alignment import Alignment, load
from mmkd.distill.batch import TeacherTargets
from mmkd.distill.config import HeadConfig
from mmkd.distill.losses import PairFeatures, unit
from mmkd.distill.teacher_features import TeacherFeatures


class Heads(nn.Module):
    """A head for each teacher, shared by image and text: what aligns the two in the student does so for the teacher."""

    def __init__(self, kind: str, student_dim: int, slugs: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__()
        wrong = [f"{slug} ({width})" for slug, width in zip(slugs, widths, strict=True) if width != student_dim]
        if kind == "none" and wrong:
            raise ConfigError(
                f"heads.kind none compares the student's {student_dim} numbers with those of {', '.join(wrong)}; "
                "name an alignment of that width, or take linear heads"
            )
        self.slugs = tuple(slugs)
        self.maps = nn.ModuleList(_head(kind, student_dim, width) for width in widths)

    def forward(self, teacher: int, features: torch.Tensor) -> torch.Tensor:
        """Map student features, float (B, D), to where they meet this teacher's: (B, A)."""
        return self.maps[teacher](features)


def _head(kind: str, student_dim: int, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(student_dim, width, bias=False)
    return nn.Sequential(nn.Linear(student_dim, width), nn.GELU(), nn.Linear(width, width, bias=False))


def fixed_alignment(config: HeadConfig, teachers: TeacherFeatures) -> Alignment | None:
    """Return the configured alignment, checked against the store's teachers. Raises as `load` and `Alignment.check`."""
    if config.alignment is None:
        return None
    alignment = load(config.alignment)
    alignment.check(teachers.cards)
    return alignment


@dataclass(frozen=True)
class Preparation:
    """Teachers' stored features as the losses want them: aligned, of unit norm when `to_unit`, masked."""

    slugs: tuple[str, ...]
    alignment: Alignment | None
    to_unit: bool

    def __call__(self, targets: Sequence[TeacherTargets], group: torch.Tensor) -> list[PairFeatures]:
        """Return rows of every teacher, float32 (B, A), in the order of the run's teachers."""
        prepared = []
        for slug, target in zip(self.slugs, targets, strict=True):
            image, text = target.image.float(), target.text.float()
            if self.alignment is not None:
                image, text = self.alignment(slug, "image", image), self.alignment(slug, "text", text)
            if self.to_unit:
                image, text = unit(image), unit(text)
            prepared.append(PairFeatures(image, text, group, target.present))
        return prepared


def mix_teachers(prepared: Sequence[PairFeatures], shares_BT: torch.Tensor) -> PairFeatures:
    """Return one set of rows, each of the teacher that has its whole share; rows without one are not available."""
    image, text = (torch.stack([getattr(pairs, tower) for pairs in prepared], dim=1) for tower in ("image", "text"))
    chosen = shares_BT.argmax(dim=1)[:, None, None].expand(-1, 1, image.shape[2])
    return PairFeatures(
        image.gather(1, chosen)[:, 0], text.gather(1, chosen)[:, 0], prepared[0].group, shares_BT.sum(1) > 0
    )
