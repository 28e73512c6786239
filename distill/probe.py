"""Estimate a run's cost from its first few steps. Writes nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from mmkd.base.text import counted
from mmkd.distill.config import RunConfig
from mmkd.distill.logs import memory_bytes
from mmkd.distill.prepare import prepare
from mmkd.distill.run import Run
from mmkd.distill.world import join_ranks

_STEPS = 5
_SECONDS = 20.0


@dataclass(frozen=True)
class Estimate:
    """Size and duration of a run on this machine, with the ranks that measured it."""

    rows: dict[str, int]
    """See `Pairs.counts`."""
    teachers: tuple[str, ...]
    student_parameters: int
    other_parameters: int
    """Parameters of heads and temperatures, which are not exported."""
    steps: int
    steps_left: int
    """Steps after the last checkpoint."""
    ranks: int
    device: str
    memory_bytes: int
    """Most that one rank held during the probe: on the device, or of the process without one."""
    resident_bytes: int
    """Part of it that holds teacher features on the device."""
    checkpoint_bytes: int
    """Size of one checkpoint: weights, two moments of each, and the average when there is one."""
    seconds_per_step: float
    """Mean of the probed steps after the first, images and features included."""
    terms: dict[str, float]
    """Each loss term in the first step, weighted; `total` is their sum."""
    notes: tuple[str, ...]
    """See `Run.notes`."""

    @property
    def hours(self) -> float:
        """For the steps that are left; validations and checkpoints come on top."""
        return self.steps_left * self.seconds_per_step / 3600

    def lines(self) -> Iterator[str]:
        """Yield the estimate as a user reads it."""
        rows = ", ".join(counted(count, name) for name, count in self.rows.items())
        yield f"rows           {rows}; teachers: {', '.join(self.teachers) or 'none asked'}"
        yield f"parameters     {self.student_parameters:,} student, {self.other_parameters:,} beside it"
        yield (
            f"memory         {self.memory_bytes / 1e9:.2f} GB on each of {self.ranks} x {self.device}"
            + (f", {self.resident_bytes / 1e9:.2f} GB of it features" if self.resident_bytes else "")
            + f"; {self.checkpoint_bytes / 1e9:.2f} GB a checkpoint"
        )
        done = f", {self.steps - self.steps_left:,} of them done" if self.steps_left < self.steps else ""
        yield f"steps          {self.steps:,}{done}, {self.seconds_per_step:.3f} s each in a short probe"
        yield f"hours          {self.hours:.2f}"
        terms = ", ".join(f"{name} {value:.3g}" for name, value in self.terms.items() if name != "total")
        yield f"loss           {self.terms['total']:.3g} in the first step, weighted: {terms}"
        for note in self.notes:
            yield f"note           {note}"


def estimate(config: RunConfig, say: Callable[[str], None] = print) -> Estimate | None:
    """Take a few steps of the run and discard them; None in every rank but the first. What is known beforehand is said
    before the first step, which may run out of memory. Raises MmkdError if the run cannot start."""
    with join_ranks(config.compute.timeout_minutes) as world, TemporaryDirectory(prefix="mmkd-") as scratch:
        run = prepare(config, world, Path(scratch))
        if world.first:
            say(f"{run.headline}; taking the first {_STEPS + 1} at most ...")
        seconds, terms = _probe(run)
        if not world.first:
            return None
        teachers, model, pairs = run.batches.teachers, run.update.model, run.batches.pairs
        weights = sum(value.nbytes for value in model.state_dict().values())
        moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        average = sum(value.nbytes for value in run.average.values.values()) if run.average else 0
        return Estimate(
            rows=pairs.counts,
            teachers=tuple(slug for slug, count in pairs.taught.items() if count),
            student_parameters=run.parameters,
            other_parameters=sum(parameter.numel() for parameter in model.objective.parameters()),
            steps=run.schedule.total_steps,
            steps_left=run.schedule.total_steps - run.progress.step,
            ranks=world.size,
            device=world.device.type,
            memory_bytes=memory_bytes(world.device),
            resident_bytes=teachers.resident_bytes if teachers else 0,
            checkpoint_bytes=weights + moments + average,
            seconds_per_step=seconds,
            terms=terms,
            notes=tuple(run.notes()),
        )


def _probe(run: Run) -> tuple[float, dict[str, float]]:
    """Return seconds of a step, and the weighted terms of the first, which is not timed: it warms up and compiles."""
    # From the beginning: a finished run has no step left to measure.
    times = [time.perf_counter()]
    with closing(run.batches), closing(run.batches.from_step(0)) as batches:
        for number, batch in enumerate(islice(batches, _STEPS + 1)):
            outcome = run.update(batch)
            outcome.finite()  # waits for the device
            if number == 0:
                weights = run.config.loss
                terms = {name: value * getattr(weights, name, 1.0) for name, value in outcome.values().items()}
            times.append(time.perf_counter())
            if run.world.highest(number > 0 and times[-1] - times[0] > _SECONDS):
                break
    timed = times[1:] if len(times) > 2 else times
    return (timed[-1] - timed[0]) / (len(timed) - 1), terms
