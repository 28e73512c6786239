"""The processes of one run: one alone, or many under torchrun (or srun with torchrun's variables). Every rank holds its
share of each batch. An objective gathers the features that it contrasts; gradients are averaged over ranks. A rank that
dies ends the run: the others fail at the next exchange, or after the timeout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mmkd.base.errors import UserError, cause


@dataclass(frozen=True)
class World:
    """One process of a run, and its communication with the others."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """Group over the CPU for flags, so that an exchange does not wait for the device."""

    @property
    def first(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate (b, ...) of every rank to (size * b, ...) in order of rank; all ranks must have the same b. A
        row's gradient returns to the rank that it came from, summed over all ranks."""
        if self.size == 1:
            return tensor
        return _Gather.apply(tensor, self.rank, self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, without gradient."""
        if self.size == 1:
            return tensor.detach()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def highest(self, number: int) -> int:
        """Return the highest number of all ranks, exchanged over the CPU; no rank returns before all have called it."""
        if self.size == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return int(largest.item())

    def share_buffers(self, module: torch.nn.Module) -> None:
        """Give every rank the buffers of the first, which are those that are saved."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def average_gradients(self, module: torch.nn.Module) -> None:
        """Replace gradients by their mean over ranks, 0 where no loss of the run reaches, also in one rank; for small
        modules that DistributedDataParallel does not wrap."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if self.size > 1:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.size


@contextmanager
def join_ranks(timeout_minutes: float) -> Iterator[World]:
    """Join the ranks that the environment names. Raises UserError if one is gone, or does not answer in time."""
    cuda = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device)
        return
    rank = int(os.environ["RANK"])
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup), "every rank is a member"
        yield World(device, rank, size, control)
    except RuntimeError as error:
        # Gloo raises a plain RuntimeError.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = f"rank {rank} lost another rank ({cause(error, 160)})"
        raise UserError(f"{lost}; see its own message, then run the same command to go on") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums over ranks and takes this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        ctx.rank, ctx.rows = rank, len(tensor)  # type: ignore[attr-defined]
        whole = tensor.contiguous()
        # bool has no gloo kernel.
        parts = whole.to(torch.uint8) if whole.dtype == torch.bool else whole
        received = [torch.empty_like(parts) for _ in range(size)]
        dist.all_gather(received, parts)
        return torch.cat(received).to(whole.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        first = ctx.rank * ctx.rows  # type: ignore[attr-defined]
        return total[first : first + ctx.rows], None, None  # type: ignore[attr-defined]
