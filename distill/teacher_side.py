"""Where student and teachers meet: a fixed map of a teacher's features, then a learned one of the student's; and the
bank, stored features of many more rows than a batch has. Shapes: B rows, D student width, E teacher width, A width of
the comparison (E, or the alignment's), T teachers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mmkd.base.errors import ConfigError
from mmkd.distill.alignment import Alignment, load
from mmkd.distill.config import BankConfig, HeadConfig
from mmkd.distill.losses import PairFeatures, unit
from mmkd.distill.order import permute
from mmkd.distill.policies import Policy
from mmkd.distill.teacher_features import TeacherFeatures, TeacherTargets
from mmkd.store.layout import Tower

# Keeps the bank's order apart from that of the epochs, which are numbered from 0.
_ORDER = 2**64 - 1


@dataclass
class TeacherSide:
    """What a run with teachers needs beside the student. relation_scales: temperature of each teacher's
    similarities."""

    heads: "Heads"
    prepare: "Preparation"
    policy: Policy
    relation_scales: Sequence[float]
    bank: "Bank | None" = None
    towers: Sequence[tuple[Tower, ...]] = ()
    """Of each teacher; empty when all have both."""


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
        image.gather(1, chosen)[:, 0],
        text.gather(1, chosen)[:, 0],
        prepared[0].group,
        (shares_BT.sum(1) > 0)[:, None].expand(-1, 2),
    )


class Bank:
    """K rows of all teachers, kept on the device and refreshed by order: a function of (seed, step), so no checkpoint
    holds them. The rows have one shuffled order, taken cyclically; at step s the bank holds the places s*r to s*r + K
    of it, r rows being replaced each step. No row is in it twice. rows: int64 (n,) grid rows of the run. group: int64
    (n,) or (n, 2), see `Batch.groups`. gather: reads the store. prepare: aligns and normalizes."""

    def __init__(
        self,
        rows: NDArray[np.int64],
        group: NDArray[np.int64],
        gather: Callable[[NDArray[np.int64]], Sequence[TeacherTargets]],
        prepare: Callable[[Sequence[TeacherTargets], torch.Tensor], list[PairFeatures]],
        *,
        config: BankConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.rows, self.group, self.gather, self.prepare, self.device = rows, group, gather, prepare, device
        self.size = min(config.size, len(rows))
        self.refresh = config.refresh if self.size < len(rows) else 0
        self._key, self._end = (seed, _ORDER), 0
        self._rows = torch.zeros(self.size, dtype=torch.int64, device=device)
        self._teachers: list[PairFeatures] = []

    def at(self, step: int, batch_rows: torch.Tensor) -> list[PairFeatures]:
        """Return each teacher's rows at `step`, those of the batch (int64 grid rows, all ranks) not available."""
        first = step * self.refresh
        end = first + self.size
        standing = bool(self._teachers) and first <= self._end <= end
        if not standing or self._end < end:
            places = np.arange(self._end if standing else first, end)  # of the endless order
            chosen = permute(places % len(self.rows), len(self.rows), *self._key)
            rows, group = self.rows[chosen], torch.from_numpy(self.group[chosen]).to(self.device)
            prepared = self.prepare([target.to(self.device) for target in self.gather(rows)], group)
            slots = torch.from_numpy(places % self.size).to(self.device)
            self._rows[slots] = torch.from_numpy(rows).to(self.device)
            if not self._teachers:
                self._teachers = [PairFeatures(*map(torch.empty_like, _parts(pairs))) for pairs in prepared]
            for kept, new in zip(self._teachers, prepared, strict=True):
                for old_part, new_part in zip(_parts(kept), _parts(new), strict=True):
                    old_part[slots] = new_part
            self._end = end
        free = ~torch.isin(self._rows, batch_rows.to(self.device))
        return [replace(pairs, available=pairs.mask & free[:, None]) for pairs in self._teachers]


def _parts(pairs: PairFeatures) -> tuple[torch.Tensor, ...]:
    return pairs.image, pairs.text, pairs.group, pairs.mask
