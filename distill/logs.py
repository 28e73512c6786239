"""Outputs of a run's numbers: the terminal, TensorBoard, Weights & Biases."""

import math
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mmkd.base.errors import UserError, faults_as
from mmkd.base.files import write_atomically
from mmkd.base.install import import_extra
from mmkd.distill.run import Run

_SECONDS_A_LINE = 60.0
_RATES = (
    ("samples_per_second", ".0f", "samples/s"),
    ("data_wait_share", ".0%", "waiting"),
    ("memory_gb", ".1f", "GB"),
    ("tflops", ".3g", "TFLOP/s"),
    ("mfu", ".0%", "MFU"),
)

Values = Mapping[str, float]
Board = Callable[[int, Values], None]
"""Function of a step and its values by name."""


def _below(prefix: str, values: Values) -> dict[str, str]:
    return {name[len(prefix) :]: f"{value:.3f}" for name, value in values.items() if name.startswith(prefix)}


def _rates(values: Values) -> dict[str, str]:
    return {name: f"{values[key]:{form}}" for key, form, name in _RATES if key in values}


class Terminal:
    """Progress bar with the loss of each term, samples a second, share of time spent waiting for data, and memory."""

    def __init__(self, bar: tqdm) -> None:  # type: ignore[type-arg]
        self.bar = bar

    def __call__(self, step: int, values: Values) -> None:
        """Show the numbers of this step; rates and memory under short names."""
        self.bar.update(step + 1 - self.bar.n)
        self.bar.set_postfix(_below("loss/", values) | _rates(values))


class Lines:
    """Log without a terminal, as of a batch job: a line per minute, and one for every validation."""

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self.total, self.now, self.due = total, now, -math.inf

    def __call__(self, step: int, values: Values) -> None:
        """Write the terms, the rates and the scores of this step to stderr."""
        scores, now = _below("monitor/", values), self.now()
        if not scores and now < self.due:
            return
        self.due = now + _SECONDS_A_LINE
        shown = [f"{name} {value}" for name, value in (scores or _below("loss/", values)).items()]
        shown += [f"{value} {name}" for name, value in _rates(values).items()]
        sys.stderr.write(f"step {step + 1:,} of {self.total:,}: {', '.join(shown)}\n")
        sys.stderr.flush()


@contextmanager
def open_boards(run: Run) -> Iterator[Board]:
    """Open the outputs that the configuration names, as one board that is silent in every rank but the first. Raises
    UserError if W&B is wanted and not installed, or refuses the run."""
    logging, first, total = run.config.logging, run.progress.step, run.schedule.total_steps
    boards: list[Board] = []
    with ExitStack() as stack:
        if run.world.first:
            bar = stack.enter_context(tqdm(total=total, initial=first, unit="step", disable=None))
            boards.append(Lines(total) if bar.disable else Terminal(bar))
            if logging.tensorboard:
                writer = stack.enter_context(SummaryWriter(str(run.config.out / "tensorboard"), purge_step=first))

                def write(step: int, values: Values) -> None:
                    for name, value in values.items():
                        writer.add_scalar(name, value, step)
                    writer.flush()

                boards.append(write)
            if logging.wandb is not None:
                started = stack.enter_context(_start_wandb(run))
                boards.append(lambda step, values: started.log(dict(values), step=step))

        def log(step: int, values: Values) -> None:
            for board in boards:
                board(step, values)

        yield log


def _start_wandb(run: Run) -> Any:
    wandb = import_extra("wandb", "wandb", "logging.wandb", ", or drop the key")
    # One random id per run folder: a resumed run continues its own curve, also after the folder was moved.
    out = run.config.out
    note = out / "wandb-id"
    if not note.is_file():
        write_atomically(note, secrets.token_hex(4).encode())
    advice = "; run `wandb login`, set WANDB_MODE=offline, or drop the key"
    with faults_as(UserError, wandb.Error, "logging.wandb failed", advice):
        return wandb.init(
            project=run.config.logging.wandb,
            name=out.name,
            id=note.read_text(),
            resume="allow",
            dir=out,
            config=run.record.model_dump(mode="json"),
            settings=wandb.Settings(x_disable_meta=True),  # which has paths of this machine
        )


class Clock:
    """Counts seconds, `samples` of all ranks since the last lap, and time spent waiting for data."""

    def __init__(self) -> None:
        self.started = self._lap = time.perf_counter()
        self.wait_seconds = 0.0
        """Since the run began."""
        self.samples, self._waited_before = 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        before = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.started

    def lap(self, device: torch.device) -> dict[str, float]:
        """Return rates since the last lap, and the peak of memory."""
        now = time.perf_counter()
        seconds = max(now - self._lap, 1e-9)
        rates = {
            "samples_per_second": self.samples / seconds,
            "data_wait_share": (self.wait_seconds - self._waited_before) / seconds,
            "memory_gb": memory_bytes(device) / 1e9,
        }
        self._lap, self.samples, self._waited_before = now, 0, self.wait_seconds
        return rates


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process, on the device or on the machine where there is none."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
