"""Batch norms over ranks: the formulas of one plain norm over all rows, in float64."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from forked import forked_ranks, peaceful
from torch import nn

from mmkd.distill.batch_norm import prepare_batch_norms
from mmkd.distill.world import join_ranks


def norm_over(momentum: float | None, affine: bool, tracked: bool) -> nn.BatchNorm2d:
    """A norm of three channels whose parameters and statistics are not those of a new one."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=momentum, affine=affine, track_running_stats=tracked).double()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(3) + 0.5)
    return norm


def two_steps(norm: nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    """Outputs, gradients and statistics of two steps over some of six rows, whose loss is a weighted sum."""
    found = {}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x, weight = (torch.randn(6, 3, 4, 5, generator=generator, dtype=torch.float64)[rows] for _ in range(2))
        x = (3 * x + 100).requires_grad_()
        out = norm(x)
        norm.zero_grad()
        (out.square() * weight).sum().backward()
        assert x.grad is not None
        found |= {f"out {step}": out.detach(), f"x {step}": x.grad}
        found |= {f"{name} {step}": parameter.grad for name, parameter in norm.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in norm.named_buffers()}


def share_of_rank(norm: nn.BatchNorm2d, folder: Path) -> None:
    with join_ranks(1.0) as world:
        holder = nn.Sequential(norm)
        prepare_batch_norms(holder, "sync", world, 3)
        torch.save(two_steps(holder[0], slice(3 * world.rank, 3 * world.rank + 3)), folder / f"{world.rank}.pt")


@pytest.mark.parametrize(
    ("momentum", "affine", "tracked"), [(0.1, True, True), (None, True, True), (0.3, False, True), (0.1, True, False)]
)
def test_two_ranks_give_what_one_plain_norm_gives(
    tmp_path: Path, momentum: float | None, affine: bool, tracked: bool
) -> None:
    norm = norm_over(momentum, affine, tracked)
    peaceful(forked_ranks(2, share_of_rank, deepcopy(norm), tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = two_steps(norm, slice(0, 6))
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith(("out", "x")):
            found = torch.cat([first[name], second[name]])
        elif name.startswith(("weight", "bias")):
            found = first[name] + second[name]
        else:
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        assert torch.allclose(found, value, rtol=1e-10, atol=1e-10), name
