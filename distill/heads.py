"""Projections between student and teacher: a fixed map of the teacher's features, then a learned one of the student's.
Shapes: B rows, D student width, E teacher width, A width of the comparison (E, or the alignment's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmkd.base.errors import ConfigError
from mmkd.distill.alignment import Alignment, load
from mmkd.distill.config import HeadConfig
from mmkd.distill.teacher_features import TeacherFeatures


class Heads(nn.Module):
    """A head for each teacher, used for image and text alike: whatever aligns the two in the student then aligns them
    in every teacher's space."""

    def __init__(self, kind: str, student_dim: int, slugs: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__()
        wrong = [f"{slug} ({width})" for slug, width in zip(slugs, widths, strict=True) if width != student_dim]
        if kind == "none" and wrong:
            raise ConfigError(
                f"heads.kind none compares the student's {student_dim} numbers with those of {', '.join(wrong)}; "
                "name an alignment of that width, or take linear heads"
            )
        self.slugs, self.widths = tuple(slugs), tuple(widths)
        self.maps = nn.ModuleList(_head(kind, student_dim, width) for width in widths)

    def forward(self, teacher: int, features: torch.Tensor) -> torch.Tensor:
        """Student features float (B, D) in the space where they meet this teacher's: (B, A)."""
        mapped: torch.Tensor = self.maps[teacher](features)
        return mapped


def _head(kind: str, student_dim: int, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(student_dim, width, bias=False)
    return nn.Sequential(nn.Linear(student_dim, width), nn.GELU(), nn.Linear(width, width, bias=False))


def fixed_alignment(config: HeadConfig, teachers: TeacherFeatures) -> Alignment | None:
    """Return the alignment that the configuration names, checked against the store's teachers. Raises UserError if
    there is no such file, or it was fitted without one of these teachers; TeacherMismatchError if it was fitted on
    features that were made otherwise; CorruptStoreError if it is damaged."""
    if config.alignment is None:
        return None
    alignment = load(config.alignment)
    alignment.check(teachers.cards)
    return alignment


def meeting_widths(teachers: TeacherFeatures, alignment: Alignment | None) -> tuple[int, ...]:
    """Width of each teacher's features after the alignment."""
    return teachers.dims if alignment is None else tuple(alignment.width(slug) for slug in teachers.slugs)
