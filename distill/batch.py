"""One step's data on one rank, for loop and objective. Shapes: B rows of this rank, L tokens, E teacher width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

Piece = tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]
"""Images, tokens and columns of some rows: the arguments of the student's towers."""


@dataclass(frozen=True)
class TeacherTargets:
    """One teacher's features for the rows of a batch. image, text: (B, E) in the store's own type, as stored; rows that
    the teacher lacks are zero, and so is a tower that it has not. present: bool (B,), where it has all its towers."""

    image: torch.Tensor
    text: torch.Tensor
    present: torch.Tensor

    def to(self, device: torch.device) -> TeacherTargets:
        """Return the same rows on `device`; from pinned memory without waiting."""
        return TeacherTargets(*(part.to(device, non_blocking=True) for part in (self.image, self.text, self.present)))


@dataclass(frozen=True)
class Batch:
    """This rank's share of one step; the shares of all ranks, in order of rank, are the step's batch. rows: int64 (B,)
    grid rows. positions: int64 (B,), place of each row in its epoch's order. images: uint8 (B, 3, H, W). tokens: int64
    (B, L), padded to the context. columns: (B,), how many of the L columns each row needs. groups: int64 (B, 2),
    numbers of the row's tokens and of its image: rows that share either are positives of each other. targets: one for
    each teacher, in the order of the run's teachers; empty when no teacher is asked."""

    step: int
    epoch: int
    rows: NDArray[np.int64]
    positions: torch.Tensor
    images: torch.Tensor
    tokens: torch.Tensor
    columns: tuple[int, ...]
    groups: torch.Tensor
    targets: tuple[TeacherTargets, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self, size: int) -> Iterator[Piece]:
        """Yield images, tokens and columns of `size` rows at a time, for towers that cannot hold the whole share."""
        for first in range(0, len(self), size):
            span = slice(first, first + size)
            yield self.images[span], self.tokens[span], self.columns[span]

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device`; from pinned memory without waiting."""
        names = ("positions", "images", "tokens", "groups")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, targets=tuple(target.to(device) for target in self.targets), **moved)


@dataclass(frozen=True)
class StudentFeatures:
    """A student's output: image, text float32 (B, D) as the towers give them; the logarithm of its temperature."""

    image: torch.Tensor
    text: torch.Tensor
    log_scale: torch.Tensor
