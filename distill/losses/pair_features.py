"""What the losses are told of a set of image-text pairs, and how their values become one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class PairFeatures:
    """Features of n pairs, as they are to enter the dot products; every switch between unit and raw rows lies outside.

    image, text: float (n, D). group: int64 (n,), equal for equal captions, which are then positives of each other.
    available: bool (n,), or None for all; a row that is not is never a key, and its own value is to be given weight 0.
    The same pairs as T teachers of one width see them: image, text (T, n, D) and available (T, n), see `stacked`.
    """

    image: torch.Tensor
    text: torch.Tensor
    group: torch.Tensor
    available: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """`available`, also when it is None."""
        return torch.ones_like(self.group, dtype=torch.bool) if self.available is None else self.available

    def of(self, teacher: int) -> PairFeatures:
        """One of the stacked teachers."""
        available = None if self.available is None else self.available[teacher]
        return PairFeatures(self.image[teacher], self.text[teacher], self.group, available)


def stacked(teachers: Sequence[PairFeatures]) -> PairFeatures:
    """The same pairs as several teachers of one width see them, for losses of all of them at once."""
    image, text, available = (
        torch.stack([getattr(pairs, part) for pairs in teachers]) for part in ("image", "text", "mask")
    )
    return PairFeatures(image, text, teachers[0].group, available)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of unit norm, in float32 or better; a row of zeros stays one."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def weighted_mean(
    values_Q: torch.Tensor, weights_Q: torch.Tensor | None = None, total: torch.Tensor | None = None
) -> torch.Tensor:
    """``sum_i w_i v_i / total``, and 0 when nothing has weight.

    `total` is the sum of the weights when not given. Under several ranks it is the sum of the weights of all of them:
    the ranks' values, and their gradients, then add up to those of one large batch, also when the ranks hold different
    numbers of available rows.
    """
    if weights_Q is None:
        weights_Q = torch.ones_like(values_Q)
    if total is None:
        total = weights_Q.sum()
    # A row without weight may hold anything, an infinity too.
    kept_Q = torch.where(weights_Q != 0, weights_Q * values_Q, 0)
    return kept_Q.sum() / total.clamp_min(torch.finfo(values_Q.dtype).tiny)
