"""Objective: named terms of a batch and their weighted sum.

The loop knows nothing of losses and this file knows nothing of loops. Each rank is given its own share of
the batch; the sums over ranks of what it returns are the terms of the whole batch, whatever the number of ranks.
Shapes: b rows of this rank, B of all ranks, T teachers, D student width, A width of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmkd.distill.bank import Bank
from mmkd.distill.batch import Batch, StudentFeatures
from mmkd.distill.config import LossConfig
from mmkd.distill.heads import Heads
from mmkd.distill.losses import (
    INITIAL_LOG_SCALE,
    MAX_LOG_SCALE,
    TERMS,
    Comparison,
    PairFeatures,
    stacked,
    task_loss,
    unit,
)
from mmkd.distill.policies import Policy
from mmkd.distill.reduction import Reduction
from mmkd.distill.targets import Preparation, mixed
from mmkd.distill.world import World


@dataclass
class TeacherSide:
    """Parts of a run with teachers besides the student. relation_scales: of the softmax over each teacher's own
    similarities."""

    heads: Heads
    prepare: Preparation
    policy: Policy
    relation_scales: Sequence[float]
    bank: Bank | None = None


class Objective(nn.Module):
    """The terms and all that is learned for them beside the student: heads, temperatures, variances."""

    def __init__(self, config: LossConfig, side: TeacherSide | None) -> None:
        super().__init__()
        self.config = config
        self.side = side if config.teacher_terms else None
        if self.side is None:
            return
        # The released loss knows one space of keys, hence one scale and one mean.
        spaces = 1 if config.mixed_teachers else len(self.side.heads.slugs)
        self.heads = self.side.heads
        if config.cross_scale is None:
            self.cross_log_scales = nn.Parameter(torch.full((spaces,), INITIAL_LOG_SCALE))
        self.reduction = Reduction(config.balance, config.teacher_terms, spaces)

    def forward(self, student: StudentFeatures, batch: Batch, world: World) -> dict[str, torch.Tensor]:
        """This rank's part of every term before weighting, float32 scalars; the parts of all ranks sum to the terms."""
        rows = torch.from_numpy(batch.rows).to(batch.groups.device)
        group = batch.groups if self.config.equal_captions else rows
        own = PairFeatures(unit(student.image), unit(student.text), group)
        every = gathered(own, world)
        values = task_loss(own, every, student.log_scale.exp())
        terms = {"task": values.sum() / len(every.group)}
        if self.side is None:
            return terms
        prepared = self.side.prepare(batch.targets, group)
        shares = self.side.policy.shares(batch)
        if self.config.mixed_teachers:
            prepared = [mixed(prepared, shares)]
            shares = shares.sum(dim=1, keepdim=True)
        banks = None if self.side.bank is None else self.side.bank.at(batch.step, world.gather(rows))
        columns: dict[str, list[torch.Tensor]] = {name: [rows] * len(prepared) for name in self.config.teacher_terms}
        for numbers in of_one_width(prepared):
            theirs = stacked([prepared[number] for number in numbers])
            compared = Comparison(
                mapped=self._map(numbers, student, group),
                teachers=theirs,
                all_teachers=gathered(theirs, world),
                own=own,
                every=every,
                scale=self._scales(numbers),
                student_scale=student.log_scale.exp(),
                teacher_scale=own.image.new_tensor([self.side.relation_scales[n] for n in numbers])[:, None, None],
                banks=[banks[number] for number in numbers] if banks else (),
                feature_kind=self.config.feature_kind,
            )
            for name in self.config.teacher_terms:
                for number, found_b in zip(numbers, TERMS[name](compared), strict=True):
                    columns[name][number] = found_b
        by_term = {name: torch.stack(found, dim=1) for name, found in columns.items()}
        weighted = torch.stack([getattr(self.config, name) * found.detach() for name, found in by_term.items()]).sum(0)
        shares = self.side.policy.after_losses(shares, weighted, batch)
        reduced: dict[str, torch.Tensor] = self.reduction(by_term, shares, world)
        return terms | reduced

    def _map(self, numbers: Sequence[int], student: StudentFeatures, group: torch.Tensor) -> PairFeatures:
        """Return the student's rows in the spaces of these teachers, stacked."""
        both = torch.cat([student.image, student.text])
        mapped = unit(torch.stack([self.heads(number, both) for number in numbers]))
        image, text = torch.split(mapped, len(student.image), dim=1)
        return PairFeatures(image, text, group)

    def _scales(self, numbers: Sequence[int]) -> torch.Tensor:
        """Return the softmax scale over each teacher's keys: (T, 1, 1), or a scalar for all."""
        if self.config.cross_scale is not None:
            return torch.tensor(self.config.cross_scale)
        return self.cross_log_scales[list(numbers)].exp()[:, None, None]

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum that is minimized."""
        return torch.stack([getattr(self.config, name) * term for name, term in terms.items()]).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep temperatures within CLIP's limits; called after every step."""
        if self.side is not None and self.config.cross_scale is None:
            self.cross_log_scales.clamp_(0, MAX_LOG_SCALE)


def of_one_width(prepared: Sequence[PairFeatures]) -> list[list[int]]:
    """Return the places of the teachers, those of one width together: each loss is then computed once for all of
    them."""
    found: dict[int, list[int]] = {}
    for number, pairs in enumerate(prepared):
        found.setdefault(pairs.image.shape[1], []).append(number)
    return list(found.values())


def gathered(pairs: PairFeatures, world: World) -> PairFeatures:
    """Return the rows of all ranks; the student's gradients flow back to the rank that a row came from."""
    if world.size == 1:
        return pairs
    rows = pairs.image.dim() - 2  # behind the teachers, when they are stacked

    def every(part: torch.Tensor, axis: int) -> torch.Tensor:
        return world.gather(part.transpose(0, axis)).transpose(0, axis)

    available = None if pairs.available is None else every(pairs.available, rows)
    return PairFeatures(every(pairs.image, rows), every(pairs.text, rows), world.gather(pairs.group), available)
