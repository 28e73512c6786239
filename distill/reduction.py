"""Reduction of row and teacher values to one number per term: shares, and the balance between teachers. Shapes: b rows
of this rank, T teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from mmkd.distill.losses import weighted_mean
from mmkd.distill.world import World

Balance = Literal["none", "equal", "learned"]


class Reduction(nn.Module):
    """``sum_it w_it v_it / sum_it w_it`` over the rows of all ranks, w being the shares; then the balance.

    With W_t the shares of teacher t, W their sum and m_t its mean value:

    - none: ``sum_t W_t/W m_t``;
    - equal: ``sum_t W_t/W m_t c_t`` with ``c_t = m / m_t`` held constant, m the unbalanced value: each teacher's
      part is of one size, so that one with large values does not drown the others (the gradient is that of a weighted
      geometric mean);
    - learned: ``sum_t W_t/W (exp(-u_t) m_t + u_t)``, u_t learned (uncertainty weighting, arXiv 1705.07115).
    """

    def __init__(self, balance: Balance, terms: Sequence[str], teachers: int) -> None:
        super().__init__()
        self.balance, self.places = balance, {name: number for number, name in enumerate(terms)}
        if balance == "learned":
            # One vector: matrices would be decayed.
            self.log_variances = nn.Parameter(torch.zeros(len(terms) * teachers))

    def forward(
        self, values: Mapping[str, torch.Tensor], shares_bT: torch.Tensor, world: World
    ) -> dict[str, torch.Tensor]:
        """This rank's part of every term, from its values float (b, T)."""
        return {name: self._one(name, found, shares_bT, world) for name, found in values.items()}

    def _one(self, name: str, values_bT: torch.Tensor, shares_bT: torch.Tensor, world: World) -> torch.Tensor:
        weight_T = world.sum(shares_bT.sum(0))
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
