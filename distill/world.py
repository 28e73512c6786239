"""The processes of one run: one alone, or many under torchrun (or srun with torchrun's variables). Every rank holds its
share of each batch. An objective gathers the features that it contrasts; gradients are averaged over ranks. A rank that
dies ends the run: the others fail at the next exchange, or after the timeout."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mmkd.base.errors import DeviceError, UserError, cause


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


def local_device() -> torch.device:
    """Return this rank's GPU, or the cores where none is visible. Raises DeviceError if PyTorch cannot use those that
    are: a run that falls back to the cores in silence takes weeks."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        usable, visible = torch.cuda.is_available(), torch.cuda.device_count()
    if usable:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    if visible:
        why = cause(warned[-1].message, 300) if warned else "the driver does not answer"  # type: ignore[arg-type]
        hide = "correct the driver, or hide the GPU: CUDA_VISIBLE_DEVICES="
        raise DeviceError(f"a GPU is visible, and PyTorch {torch.__version__} cannot use it ({why}); {hide}")
    return torch.device("cpu")


@contextmanager
def join_ranks(timeout_minutes: float) -> Iterator[World]:
    """Join the ranks that the environment names. Raises UserError if one is gone, or does not answer in time, or if a
    device has too little memory for what is done in the block; DeviceError if one cannot be used or answers no more."""
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    again = "run the same command to go on"
    try:
        device = local_device()
        if size == 1:
            yield World(device)
            return
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup), "every rank is a member"
        yield World(device, rank, size, control)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"too little memory ({cause(error, 160)}); set compute.micro_batch to less than a rank's share of "
            f"batch_size, or end what else runs on the device (nvidia-smi names it), and {again}"
        ) from error
    except RuntimeError as error:
        if "CUDA error" in str(error):
            log = "its driver's log says why (dmesg, nvidia-smi)"
            raise DeviceError(f"a GPU answers no more ({cause(error, 160)}); {log}; {again}") from error
        # Gloo raises a plain RuntimeError.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = f"rank {rank} lost another rank ({cause(error, 160)})"
        raise UserError(f"{lost}; see its own message, then {again}") from error
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
