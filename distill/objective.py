"""Objective: named terms of a batch and their weighted sum.

The loop knows nothing of losses and this file knows nothing of loops. Each rank is given its own share of the batch;
the sums over ranks of what it returns are the terms of the whole batch, whatever the number of ranks. Shapes: b rows of
this rank, B of all ranks, T teachers, D student width, A width of a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mmkd.base.errors import ConfigError
from mmkd.distill.batches import Batch
from mmkd.distill.config import LossConfig, RunConfig
from mmkd.distill.losses import (
    INITIAL_LOG_SCALE,
    MAX_LOG_SCALE,
    Comparison,
    PairFeatures,
    stack_teachers,
    task_loss,
    unit,
    weighted_mean,
)
from mmkd.distill.policies import make_policy
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.distill.teacher_side import Bank, Heads, Preparation, TeacherSide, fixed_alignment, mix_teachers
from mmkd.distill.terms import ONE_TOWER_TERMS, TERMS, UNPAIRED_TERMS
from mmkd.distill.world import World
from mmkd.store.layout import OTHER_TOWER, TOWERS

# Logits of a teacher whose card has no temperature: CLIP's first one, 1/0.07 (arXiv 2103.00020, section 2.5).
_USUAL_SCALE = 1 / 0.07


@dataclass(frozen=True)
class StudentFeatures:
    """A student's output: image, text float32 (B, D) as the towers give them; the logarithm of its temperature."""

    image: torch.Tensor
    text: torch.Tensor
    log_scale: torch.Tensor


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
        """Return this rank's part of every term before weighting, float32 scalars; the ranks' parts sum to the
        terms."""
        rows = torch.from_numpy(batch.rows).to(batch.groups.device)
        group = batch.groups if self.config.equal_captions else rows
        own = PairFeatures(unit(student.image), unit(student.text), group, batch.has)
        every = _of_all_ranks(own, world)
        values = task_loss(own, every, student.log_scale.exp())
        terms = {"task": weighted_mean(values, own.mask.all(-1).float(), every.mask.all(-1).sum())}
        if self.side is None:
            return terms
        prepared = self.side.prepare(batch.targets, group)
        scores = self.side.policy.scores(batch)
        shares = self.side.policy.shares(batch, scores)
        if self.config.mixed_teachers:
            prepared = [mix_teachers(prepared, shares)]
            shares = shares.sum(dim=1, keepdim=True)
        known = self.side.policy.knowledge(batch, scores)
        if known is not None:
            known = world.gather(known).permute(2, 1, 0)
        banks = None if self.side.bank is None else self.side.bank.at(batch.step, world.gather(rows))
        columns: dict[str, list[torch.Tensor]] = {name: [rows] * len(prepared) for name in self.config.teacher_terms}
        both = torch.cat([student.image, student.text])
        for width in dict.fromkeys(pairs.image.shape[1] for pairs in prepared):
            # Each loss is computed once for all teachers of a width.
            numbers = [number for number, pairs in enumerate(prepared) if pairs.image.shape[1] == width]
            mapped = unit(torch.stack([self.heads(number, both) for number in numbers]))
            image, text = torch.split(mapped, len(student.image), dim=1)
            theirs = stack_teachers([prepared[number] for number in numbers])
            fixed = self.config.cross_scale
            scale = self.cross_log_scales[numbers].exp()[:, None, None] if fixed is None else torch.tensor(fixed)
            compared = Comparison(
                mapped=PairFeatures(image, text, group),
                teachers=theirs,
                all_teachers=_of_all_ranks(theirs, world),
                own=own,
                every=every,
                scale=scale,
                student_scale=student.log_scale.exp(),
                teacher_scale=own.image.new_tensor([self.side.relation_scales[n] for n in numbers])[:, None, None],
                banks=[banks[number] for number in numbers] if banks else (),
                feature_kind=self.config.feature_kind,
                known=None if known is None else known[:, numbers],
            )
            for name in self.config.teacher_terms:
                for number, found_b in zip(numbers, TERMS[name](compared), strict=True):
                    columns[name][number] = found_b
        by_term = {name: torch.stack(found, dim=1) for name, found in columns.items()}
        taught = {name: self._taught(name, [pairs.mask for pairs in prepared]) for name in by_term}
        weighted = torch.stack(
            [getattr(self.config, name) * torch.where(taught[name], v.detach(), 0) for name, v in by_term.items()]
        )
        shares = self.side.policy.after_losses(shares, weighted.sum(0), batch)
        return terms | self.reduction(by_term, shares, world, taught)

    def _taught(self, name: str, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return which rows learn a term from which teachers, bool (b, T), from each teacher's (b, 2)."""
        assert self.side is not None, "asked with teachers only"
        there_bT2 = torch.stack(list(masks), dim=1)
        if name not in UNPAIRED_TERMS:
            return there_bT2.all(-1)
        single = [name not in ONE_TOWER_TERMS and own != TOWERS for own in self.side.towers]
        there_bT = there_bT2.any(-1)
        return there_bT & ~torch.tensor(single, device=there_bT.device) if any(single) else there_bT

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum that is minimized."""
        return torch.stack([getattr(self.config, name) * term for name, term in terms.items()]).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep temperatures within CLIP's limits; called after every step."""
        if self.side is not None and self.config.cross_scale is None:
            self.cross_log_scales.clamp_(0, MAX_LOG_SCALE)


def _of_all_ranks(pairs: PairFeatures, world: World) -> PairFeatures:
    """Return the rows of all ranks; the student's gradients flow back to the rank that a row came from."""
    if world.size == 1:
        return pairs
    rows = pairs.image.dim() - 2  # behind the teachers, when they are stacked

    def every(part: torch.Tensor) -> torch.Tensor:
        return world.gather(part.transpose(0, rows)).transpose(0, rows)

    available = None if pairs.available is None else every(pairs.available)
    return PairFeatures(every(pairs.image), every(pairs.text), world.gather(pairs.group), available)


class Reduction(nn.Module):
    """``sum_it w_it v_it / sum_it w_it`` over the rows of all ranks, w being the shares; then the balance.

    With W_t the shares of teacher t, W their sum and m_t its mean value:

    - none: ``sum_t W_t/W m_t``;
    - equal: ``sum_t W_t/W m_t c_t`` with ``c_t = m / m_t`` held constant, m the unbalanced value: each teacher's
      part is of one size, so that one with large values does not drown the others (the gradient is that of a weighted
      geometric mean);
    - learned: ``sum_t W_t/W (exp(-u_t) m_t + u_t)``, u_t learned (uncertainty weighting, arXiv 1705.07115).
    """

    def __init__(self, balance: Literal["none", "equal", "learned"], terms: Sequence[str], teachers: int) -> None:
        super().__init__()
        self.balance, self.places = balance, {name: number for number, name in enumerate(terms)}
        if balance == "learned":
            # One vector: matrices would be decayed.
            self.log_variances = nn.Parameter(torch.zeros(len(terms) * teachers))

    def forward(
        self,
        values: Mapping[str, torch.Tensor],
        shares_bT: torch.Tensor,
        world: World,
        taught: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Return this rank's part of every term, from its values float (b, T). taught: by term, bool (b, T), where a
        teacher's share in a row counts."""
        shares = {name: shares_bT * taught[name] for name in values}
        weights = world.sum(torch.stack([share_bT.sum(0) for share_bT in shares.values()]))
        return {
            name: self._reduce(name, found, shares[name], weight_T, world)
            for weight_T, (name, found) in zip(weights, values.items(), strict=True)
        }

    def _reduce(
        self, name: str, values_bT: torch.Tensor, shares_bT: torch.Tensor, weight_T: torch.Tensor, world: World
    ) -> torch.Tensor:
        if self.balance == "none":
            return weighted_mean(values_bT, shares_bT, weight_T.sum())
        part_T = torch.stack(
            [weighted_mean(v, w, weight_T.sum()) for v, w in zip(values_bT.T, shares_bT.T, strict=True)]
        )
        if self.balance == "learned":
            teachers = values_bT.shape[1]
            u_T = self.log_variances[self.places[name] * teachers :][:teachers]
            share_T = weight_T / weight_T.sum().clamp_min(torch.finfo(weight_T.dtype).tiny)
            return ((-u_T).exp() * part_T + u_T * share_T / world.size).sum()
        whole_T = world.sum(part_T)
        # m / m_t, from W_t m_t / W; a teacher without rows or without loss has nothing to balance.
        mean_T = whole_T * weight_T.sum() / weight_T.clamp_min(torch.finfo(weight_T.dtype).tiny)
        factor_T = torch.where(mean_T > 0, whole_T.sum() / mean_T.clamp_min(torch.finfo(mean_T.dtype).tiny), 0)
        return (factor_T * part_T).sum()


def make_objective(
    config: RunConfig,
    student_dim: int,
    teachers: TeacherFeatures | None,
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    device: torch.device,
) -> Objective:
    """Build the objective of a run with grid rows, int64 (n,), that stand for all of its, and `Batch.groups` of these,
    (n, 2); teachers are None when no term asks them. Heads and bank are on `device`. Raises ConfigError, UserError if
    widths, teachers' names or the alignment do not fit the store."""
    loss = config.loss
    if teachers is None:
        return Objective(loss, None)
    if config.policy.keys == "known" and "relational" not in loss.teacher_terms:
        raise ConfigError("policy.keys known changes the term relational, whose weight is 0; set loss.relational")
    alignment = fixed_alignment(config.heads, teachers)
    widths = teachers.dims if alignment is None else tuple(alignment.width(slug) for slug in teachers.slugs)
    if loss.mixed_teachers and (config.policy.kind != "one" or config.policy.drop or len(set(widths)) > 1):
        raise ConfigError(
            f"loss.mixed_teachers wants policy {{kind: one}} without drop and teachers of one width, "
            f"here {{kind: {config.policy.kind}}} and widths {', '.join(map(str, sorted(set(widths))))}; "
            "name an alignment in `heads`"
        )
    _check_towers(config, teachers)
    heads = Heads("none" if loss.mixed_teachers else config.heads.kind, student_dim, teachers.slugs, widths)
    prepare = Preparation(teachers.slugs, None if alignment is None else alignment.to(device), loss.unit_teachers)
    policy = make_policy(config.policy, config.seed, teachers, rows, groups, device, unpaired=config.data.unpaired)
    bank = None
    if "bank" in loss.teacher_terms:
        same = groups if loss.equal_captions else rows
        if config.data.unpaired:
            paired = (groups >= 0).all(axis=1)
            rows, same = rows[paired], same[paired]
        bank = Bank(rows, same, teachers.gather, prepare, config=loss.bank_rows, seed=config.seed, device=device)
    scales = [card.logit_scale or _USUAL_SCALE for card in teachers.cards.values()]
    return Objective(loss, TeacherSide(heads, prepare, policy, scales, bank, teachers.towers)).to(device)


def check_unpaired(config: RunConfig, unpaired: int) -> None:
    """Raise ConfigError for so many rows without a pair if the run has nothing that learns from them."""
    where = f"data.unpaired: {unpaired:,} rows have an image or a caption alone"
    if unpaired and not UNPAIRED_TERMS & set(config.loss.teacher_terms):
        names = " or ".join(f"loss.{name}" for name in sorted(UNPAIRED_TERMS))
        raise ConfigError(f"{where}, and no term learns from those; set {names}, or leave data.unpaired out")
    if unpaired and config.policy.kind == "best" and config.policy.by == "caption":
        raise ConfigError(f"{where}, which policy.by caption cannot judge; set policy.by: corpus")
    if unpaired and config.loss.mixed_teachers:
        raise ConfigError(f"{where}, and loss.mixed_teachers mixes pairs; leave one of them out")


def _check_towers(config: RunConfig, teachers: TeacherFeatures) -> None:
    """Raise ConfigError for a term, policy or mixture that a teacher with one tower cannot serve."""
    single = [slug for slug, towers in zip(teachers.slugs, teachers.towers, strict=True) if towers != TOWERS]
    if not single:
        return
    lacks = f"teacher {single[0]} has no {OTHER_TOWER[teachers.cards[single[0]].towers[0]]} tower"
    pair_terms = [name for name in config.loss.teacher_terms if name not in ONE_TOWER_TERMS]
    if pair_terms and len(single) == len(teachers.slugs):
        raise ConfigError(
            f"loss.{pair_terms[0]} compares images with texts and {lacks}, as no teacher of the run has both; "
            f"set loss.{pair_terms[0]}: 0, or add a teacher with both towers"
        )
    if config.policy.kind == "best" and len(single) == len(teachers.slugs):
        raise ConfigError(
            f"policy.kind best judges teachers by images and texts, and {lacks}, as no teacher of the run has both; "
            "take another policy, or add a teacher with both towers"
        )
    if config.loss.mixed_teachers:
        raise ConfigError(f"loss.mixed_teachers mixes images and texts, and {lacks}; name others in `teachers`")
