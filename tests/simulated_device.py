"""An accelerator that computes nothing and takes its time, for tests and benchmarks: what is measured against it is our
pipeline. Passes, copies and memory are stated; its clock runs beside the host's, which sleeps when it waits.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field

import torch

from mmkd.extract.device import Accelerator, Encode, Pass, Wait


@dataclass(eq=False)
class SimulatedDevice(Accelerator):
    """Passes run one behind another, each after the copies that were begun before it. `encode` is called on the host
    when a pass is launched, so give it next to nothing to do where time is measured. A plain CPU to PyTorch."""

    row_seconds: float = 0.0
    """Of a pass, for each row."""
    pass_seconds: float = 0.0
    """Of each pass besides."""
    launch_seconds: float = 0.0
    """That the host needs to launch a pass; one with less to compute takes this long, too."""
    bandwidth: float = 25e9
    """Bytes a second of copies, in each direction."""
    memory: float = float("inf")
    """Bytes for what was staged and for the activations of a pass."""
    row_bytes: int = 0
    """Activations of a pass, for each row."""
    lost_after: float = float("inf")
    """Passes that it lives for: the next one fails, and everything after it."""
    place: torch.device = field(default_factory=lambda: torch.device("cpu"))
    name: str = "simulated"
    busy_seconds: float = 0.0
    """Spent on passes so far."""
    launched: int = 0
    _first: float = float("inf")
    _staged: int = 0
    _copied: float = 0.0
    _over: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def busy_share(self) -> float:
        """Of the time from the beginning of the first pass to the end of the last."""
        return self.busy_seconds / (self._over - self._first)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy_in(self, host: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        self._take(host.nbytes, "copied")
        moved = host.clone()
        self._staged += host.nbytes
        weakref.finalize(moved, self._free, host.nbytes)
        over = self._copied = max(time.perf_counter(), self._copied) + host.nbytes / self.bandwidth
        return moved, lambda: _sleep_until(over)

    def launch(self, encode: Encode, inputs: torch.Tensor) -> Pass:
        began = time.perf_counter()
        self._take(len(inputs) * self.row_bytes, "computed")
        if not self.alive():
            raise RuntimeError("CUDA error: unspecified launch failure")
        self.launched += 1
        features = encode(inputs).float()
        _sleep_until(began + self.launch_seconds)
        spent = self.pass_seconds + len(inputs) * self.row_seconds
        began = max(began, self._copied, self._over)
        self._first = min(self._first, began)
        self._over = over = max(began + spent, time.perf_counter() if self.launch_seconds else 0.0)
        self.busy_seconds += spent
        there = over + features.nbytes / self.bandwidth
        return Pass(features, lambda: _sleep_until(there), lambda: over - began)

    def release(self) -> None:
        _sleep_until(self._over)

    def alive(self) -> bool:
        return self.launched < self.lost_after

    def _take(self, wanted: int, what: str) -> None:
        if self._staged + wanted > self.memory:
            raise torch.OutOfMemoryError(f"simulated: {wanted} bytes cannot be {what}, {self._staged} are in use")

    def _free(self, size: int) -> None:
        self._staged -= size


def _sleep_until(moment: float) -> None:
    if (left := moment - time.perf_counter()) > 0:
        time.sleep(left)
