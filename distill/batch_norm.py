"""Batch norms of a student: synchronized over ranks, or frozen."""

from typing import Literal, cast

import torch
from torch import nn

from mmkd.base.errors import ConfigError
from mmkd.distill.world import World

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base of torch's and timm's."""


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """List the batch norms of a network."""
    return [part for part in module.modules() if isinstance(part, BatchNorm)]


def prepare_batch_norms(module: nn.Module, kind: Literal["sync", "frozen"], world: World, smallest: int) -> None:
    """Make every batch norm use its running statistics (`frozen`), or those of all ranks' rows (`sync`). They change
    their class in place; weights and names stay. `smallest`: rows of this rank in the smallest piece of a step. Raises
    ConfigError if a piece has a single row, which has no variance."""
    norms = batch_norms(module)
    if norms and kind == "sync" and smallest * world.size == 1:
        raise ConfigError(
            "compute.micro_batch leaves a piece of one row, and the student's batch norms need two; choose another "
            "micro_batch, or `batch_norm: frozen`"
        )
    for norm in norms if kind == "frozen" or world.size > 1 else ():
        base = type(norm)
        norm.__class__ = type(base.__name__, (_Frozen if kind == "frozen" else _Synced, base), {"world": world})
        norm.train(kind == "sync")


def refuse_batch_norms(module: nn.Module) -> None:
    """Raise ConfigError if a batch norm learns: its statistics want the same number of images in every rank."""
    if any(norm.training for norm in batch_norms(module)):
        raise ConfigError(
            "data.unpaired: rows without an image leave ranks and pieces of a step with different numbers of images, "
            "and the student's batch norms learn; set compute.batch_norm: frozen, or leave such rows out with `where`"
        )


class _Frozen(nn.Module):
    def train(self, mode: bool = True) -> "_Frozen":
        return super().train(mode=False)


class _Synced(nn.Module):
    """Normalizes by the statistics of all ranks' rows. torch's SyncBatchNorm is for GPUs alone."""

    world: World

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float (B, C, ...) to the same shape; timm's batch norms have an activation behind them."""
        norm = cast(BatchNorm, self)
        if not norm.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        count = values.numel() // values.shape[1] * self.world.size
        mean = self.world.gather(values.sum(dims)[None]).sum(0) / count
        centered = values - mean.view(shape)
        variance = self.world.gather(centered.square().sum(dims)[None]).sum(0) / count
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            with torch.no_grad():
                norm.num_batches_tracked.add_(1)
                momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(mean, momentum)
                norm.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
        out = centered * (variance + norm.eps).rsqrt().view(shape)
        if norm.affine:
            out = out * norm.weight.view(shape) + norm.bias.view(shape)
        out = out.to(x.dtype)
        for name in ("drop", "act"):
            out = getattr(self, name, nn.Identity())(out)
        return out
