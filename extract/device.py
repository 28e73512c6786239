"""The seam between extraction and what computes it: inputs of a window are staged once, passes over them are launched
one behind another, and their features are collected while later ones run. `Host` is this machine's own cores, `Cuda` a
GPU; `tests/simulated_device.py` has one that computes nothing and takes its time.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.errors import DeviceError, cause
from mmkd.base.text import bytes_text

PASS_ROWS = 32
"""Rows of a forward pass on a CPU, always: a matrix product may round differently for another shape, not for other
neighbors in the same shape."""

GPU_ROWS = 256
"""Rows of a pass on an accelerator where no search has found better ones."""

Encode = Callable[[torch.Tensor], torch.Tensor]
Wait = Callable[[], object]
"""Returns when something is over; without the interpreter's lock meanwhile."""


@dataclass(frozen=True)
class Pass:
    """A forward pass that was launched. features: float32 (n, D) in main memory, there when `over` returns, which
    raises RuntimeError if the device failed. seconds: that the device spent on it; known then."""

    features: torch.Tensor
    over: Wait
    seconds: Callable[[], float]

    def wait(self) -> torch.Tensor:
        """Return the features once the pass is over."""
        self.over()
        return self.features


class Device:
    """Where teachers run. One shard at a time stages and launches; waiting is free to all threads."""

    place: torch.device
    """Of the weights and of what `stage` returns."""
    name: str
    """Of the model, for notes about its speed."""
    start_rows: int
    """Rows of a pass where nothing else is known."""
    ahead: int
    """Windows on the device before the first of them is collected; 0 where a launched pass is over at once."""

    def stage(self, rows: Sequence[NDArray[Any]]) -> torch.Tensor:
        """Return equal arrays as (n, ...) on the device. `rows` may be changed afterwards; nothing waits for a copy."""
        raise NotImplementedError

    def launch(self, encode: Encode, inputs: torch.Tensor) -> Pass:
        """Queue `encode(inputs)` behind all that was launched before. Raises OutOfMemoryError if it does not fit."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back memory that no tensor uses, after something did not fit; the allocator of a process does it."""

    def alive(self) -> bool:
        """Return False if the device answers no more, whatever is asked of it."""
        return True


class Host(Device):
    """This machine's cores. Every pass has `PASS_ROWS` rows, the last one filled up with its own last row."""

    place = torch.device("cpu")
    name = "cpu"
    start_rows = PASS_ROWS
    ahead = 0

    def stage(self, rows: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows))

    def launch(self, encode: Encode, inputs: torch.Tensor) -> Pass:
        started, parts = time.perf_counter(), []
        for part in inputs.split(PASS_ROWS):  # type: ignore[no-untyped-call]
            surplus = part[-1:].expand(PASS_ROWS - len(part), *part.shape[1:])
            parts.append(encode(torch.cat([part, surplus])).float()[: len(part)])
        spent = time.perf_counter() - started
        return Pass(torch.cat(parts), lambda: None, lambda: spent)


class Accelerator(Device):
    """A device with memory of its own. Inputs pass through a ring of buffers for each shape, so that a window is
    written while the copy of the one before is still on its way."""

    start_rows = GPU_ROWS
    ahead = 2

    def __init__(self) -> None:
        self._rings: dict[tuple[object, ...], deque[tuple[torch.Tensor, Wait]]] = {}

    def stage(self, rows: Sequence[NDArray[Any]]) -> torch.Tensor:
        shape, dtype = rows[0].shape, torch.from_numpy(np.empty(0, rows[0].dtype)).dtype
        ring = self._rings.setdefault((shape, dtype), deque())
        if len(ring) <= self.ahead:
            ring.appendleft((torch.empty(0), lambda: None))
        buffer, copied = ring.popleft()
        copied()
        if len(buffer) < len(rows):
            buffer = self.host_buffer((len(rows), *shape), dtype)
        part = buffer[: len(rows)]
        np.stack(rows, out=part.numpy())
        moved, copied = self.copy_in(part)
        ring.append((buffer, copied))
        return moved

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return main memory that the device copies from by itself."""
        raise NotImplementedError

    def copy_in(self, host: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        """Begin a copy to the device; what is launched from here on comes after it. Returns the copy and how to wait
        until `host` may be written again."""
        raise NotImplementedError


class Cuda(Accelerator):
    """A GPU. Copies to it have a stream of their own; passes, and the copies of their features, share the current one,
    which the allocator knows: launching ahead takes no more memory for activations."""

    def __init__(self, place: torch.device) -> None:
        super().__init__()
        self.place, self.name = place, torch.cuda.get_device_name(place)
        self._copies = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy_in(self, host: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            moved = host.to(self.place, non_blocking=True)
            copied.record(self._copies)
        passes = torch.cuda.current_stream(self.place)
        passes.wait_event(copied)
        moved.record_stream(passes)
        return moved, copied.synchronize

    def launch(self, encode: Encode, inputs: torch.Tensor) -> Pass:
        # With times, and blocking: a thread that waits sleeps, and leaves its core to the decoders.
        began, over = (torch.cuda.Event(True, True) for _ in range(2))  # type: ignore[no-untyped-call]
        passes = torch.cuda.current_stream(self.place)
        began.record(passes)
        features = encode(inputs).float()
        host = self.host_buffer(tuple(features.shape), torch.float32)
        host.copy_(features, non_blocking=True)
        over.record(passes)
        return Pass(host, over.synchronize, lambda: float(began.elapsed_time(over)) / 1000)

    def release(self) -> None:
        torch.cuda.synchronize(self.place)
        torch.cuda.empty_cache()

    def alive(self) -> bool:
        try:
            return bool((torch.zeros(1, device=self.place) + 1).item() == 1)
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False


def open_device() -> Device:
    """Return this process' GPU, or its cores where no GPU is visible. Raises DeviceError for a GPU that is visible and
    cannot be used."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        usable, visible = torch.cuda.is_available(), torch.cuda.device_count()
    hide = "correct the driver, or hide the GPU: CUDA_VISIBLE_DEVICES="
    if not usable:
        if not visible:
            return Host()
        why = cause(warned[-1].message, 300) if warned else "the driver does not answer"  # type: ignore[arg-type]
        raise DeviceError(f"a GPU is visible, and PyTorch {torch.__version__} cannot use it ({why}); {hide}")
    place = torch.device("cuda", torch.cuda.current_device())
    try:
        torch.zeros(1, device=place).add_(1).item()
        return Cuda(place)
    except RuntimeError as error:
        why = cause(error)
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in why:
            raise full_device(place) from error
        raise DeviceError(f"{place} is visible and cannot be used ({why}); {hide}") from error


def full_device(place: torch.device) -> DeviceError:
    """Return the error of a device whose memory does not hold the teachers, with what others left of it."""
    left = ""
    if place.type == "cuda":
        try:
            free, total = torch.cuda.mem_get_info(place)
            left = f": {bytes_text(free)} of {bytes_text(total)} are free"
        except RuntimeError:
            left = ": nothing is free"
    return DeviceError(
        f"{place} has no room for the teachers{left}; end what else runs there (nvidia-smi names it), give fewer "
        "teachers a run, or choose another device with CUDA_VISIBLE_DEVICES"
    )


def lost_device(place: torch.device, error: BaseException) -> DeviceError:
    """Return the error of a device that answers no more."""
    return DeviceError(f"{place} answers no more ({cause(error)}); its driver's log says why (dmesg, nvidia-smi)")
