"""What every method comes down to: one affine map a teacher, applied on the device.

Shapes: B rows, E teacher width, D common width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from mmkd.base.config import Frozen
from mmkd.base.errors import TeacherMismatchError, UserError
from mmkd.store.card import TeacherCard
from mmkd.store.layout import TOWERS, Tower


class AlignmentCard(Frozen):
    """What an alignment is and what it was fitted on."""

    format: int = 1
    method: str
    """Name of the method that fitted it; `none` maps every teacher onto itself."""
    settings: dict[str, Any]
    """The method's own settings."""
    dim: int | None = Field(gt=0)
    """Common width D; None when every teacher keeps its own (`none`)."""
    unit_input: bool
    """Teacher features are scaled to norm 1 before the map."""
    teachers: dict[str, str]
    """Slug to the digest of the card that the features were made with."""
    widths: dict[str, int]
    """Slug to teacher width E."""
    corpus: str
    """Digest of the corpus whose rows it was fitted on."""
    rows: int = Field(ge=0)
    """Rows that it was fitted on."""
    seed: int = 0
    scores: dict[str, Any] = Field(default_factory=dict)
    """What the judge said of it on held-out rows; see `mmkd.distill.alignment.judge`."""


@dataclass(frozen=True)
class TeacherMap:
    """``y = W x + b``: weight float32 (D, E); one bias float32 (D,) for each tower.

    The weight is shared by image and text, as they share the teacher's space; the biases differ when a
    method centres each tower by itself, which closes the gap between the two (arXiv 2203.02053).
    """

    weight: torch.Tensor
    image_bias: torch.Tensor
    text_bias: torch.Tensor


class Alignment(nn.Module):
    """Maps of all teachers of a store, as buffers: `.to(device)` moves them, nothing is ever trained.

    >>> alignment = load(path).to(device)
    >>> alignment.check(store.teachers)
    >>> alignment("biomedclip", "image", features)      # float (B, E) -> float32 (B, D)
    """

    def __init__(self, card: AlignmentCard, maps: Mapping[str, TeacherMap]) -> None:
        super().__init__()
        self.card = card
        self.slugs = tuple(card.teachers)
        self._place = {slug: index for index, slug in enumerate(self.slugs)}
        for slug, fitted in maps.items():
            # By number: a slug may hold a dot, which the name of a buffer must not.
            for name in ("weight", "image_bias", "text_bias"):
                self.register_buffer(f"{name}_{self._place[slug]}", getattr(fitted, name).detach().float())
        self.mapped = frozenset(maps)

    def width(self, slug: str) -> int:
        """Width of a teacher's features after the map.

        Raises:
            UserError: it was not fitted for this teacher.
        """
        self._index(slug)
        return self.card.dim or self.card.widths[slug]

    def teacher_map(self, slug: str) -> TeacherMap:
        """The map of one teacher; the identity where the alignment has none."""
        index = self._index(slug)
        if slug not in self.mapped:
            width = self.card.widths[slug]
            return TeacherMap(torch.eye(width), torch.zeros(width), torch.zeros(width))
        return TeacherMap(*(getattr(self, f"{name}_{index}") for name in ("weight", "image_bias", "text_bias")))

    @torch.no_grad()
    def forward(self, slug: str, tower: Tower, features: torch.Tensor) -> torch.Tensor:
        """Features of one tower, float (B, E), in the common space: float32 (B, D), without gradients.

        Raises:
            UserError: it was not fitted for this teacher, or its features have another width.
        """
        index = self._index(slug)
        if features.shape[-1] != self.card.widths[slug] or tower not in TOWERS:
            raise UserError(
                f"features of {slug} ({tower}) have width {features.shape[-1]}, "
                f"the alignment was fitted for {self.card.widths[slug]}; fit it again for this store"
            )
        # In float32 always: under autocast a half-precision matrix product would blur the targets.
        with torch.autocast(features.device.type, enabled=False):
            values = features.float()
            if self.card.unit_input:
                values = F.normalize(values, dim=-1)
            if slug not in self.mapped:
                return values
            return F.linear(values, getattr(self, f"weight_{index}"), getattr(self, f"{tower}_bias_{index}"))

    def check(self, cards: Mapping[str, TeacherCard]) -> None:
        """Refuse teachers that this alignment was not fitted for.

        Args:
            cards: slug to card of the teachers that will be used.

        Raises:
            UserError: it was fitted without one of these teachers.
            TeacherMismatchError: a teacher's features were made with other weights or preprocessing since.
        """
        for slug, card in cards.items():
            self._index(slug)
            if self.card.teachers[slug] != card.digest:
                raise TeacherMismatchError(
                    f"the alignment was fitted on teacher {slug} of digest {self.card.teachers[slug]}, "
                    f"the store's has {card.digest}; run `mmkd align` on this store"
                )

    def _index(self, slug: str) -> int:
        if slug not in self._place:
            raise UserError(f"the alignment has no teacher {slug!r}; it was fitted for {', '.join(self.slugs)}")
        return self._place[slug]
