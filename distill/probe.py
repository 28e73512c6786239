"""What a run would take, from its first few steps. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from mmkd.distill.config import RunConfig
from mmkd.distill.logs import memory_bytes
from mmkd.distill.prepare import Run, prepare
from mmkd.distill.world import World, started_world

_STEPS = 5
_SECONDS = 20.0


@dataclass(frozen=True)
class Estimate:
    """Size and duration of a run on this machine, with the ranks that measured it."""

    pairs: int
    teachers: tuple[str, ...]
    student_parameters: int
    other_parameters: int
    """Heads and temperatures that stay behind when the student is exported."""
    steps: int
    steps_left: int
    """Behind the last checkpoint."""
    ranks: int
    device: str
    memory_bytes: int
    """Most that one rank held during the probe: on the device, or of the process without one."""
    resident_bytes: int
    """Of them, teachers' features that live on the device."""
    checkpoint_bytes: int
    """Of one checkpoint: weights, two moments of each, and the average when there is one."""
    seconds_per_step: float
    """Mean of the probed steps behind the first, images and features included."""

    @property
    def hours(self) -> float:
        """For the steps that are left; validations and checkpoints come on top."""
        return self.steps_left * self.seconds_per_step / 3600

    def lines(self) -> Iterator[str]:
        """The estimate as a user reads it."""
        yield f"pairs          {self.pairs:,}; teachers: {', '.join(self.teachers) or 'none asked'}"
        yield f"parameters     {self.student_parameters:,} student, {self.other_parameters:,} beside it"
        yield (
            f"memory         {self.memory_bytes / 1e9:.2f} GB on each of {self.ranks} x {self.device}"
            + (f", {self.resident_bytes / 1e9:.2f} GB of it features" if self.resident_bytes else "")
            + f"; {self.checkpoint_bytes / 1e9:.2f} GB a checkpoint"
        )
        done = f", {self.steps - self.steps_left:,} of them done" if self.steps_left < self.steps else ""
        yield f"steps          {self.steps:,}{done}, {self.seconds_per_step:.3f} s each in a short probe"
        yield f"hours          {self.hours:.2f}"


def estimate(config: RunConfig, say: Callable[[str], None] = print) -> Estimate | None:
    """Take a few steps of the run and throw them away; None in every rank but the first.

    What is known before the first step is said before it: the step may be too large for the machine's memory.

    Raises:
        MmkdError: whatever would keep the run from starting.
    """
    with started_world(config.compute.timeout_minutes) as world:
        run = prepare(config, world)
        if world.first:
            say(f"{run.headline}; taking the first {_STEPS + 1} at most ...")
        seconds = _probe(run, world)
        return _estimate(run, world, seconds) if world.first else None


def _probe(run: Run, world: World) -> float:
    """Seconds of a step. The first one is left out: it warms caches, compiles and fills the pipeline."""
    # From the beginning: a finished run has no step left to measure.
    started, measured = time.perf_counter(), 0
    first_done = started
    with closing(run.batches.from_step(0)) as batches:
        for number, batch in enumerate(islice(batches, _STEPS + 1)):
            run.update(batch).finite()  # waits for the device
            measured = number
            if number == 0:
                first_done = time.perf_counter()
            if world.highest(number > 0 and time.perf_counter() - started > _SECONDS):
                break
    if measured == 0:
        return first_done - started
    return (time.perf_counter() - first_done) / measured


def _estimate(run: Run, world: World, seconds: float) -> Estimate:
    teachers, model = run.batches.teachers, run.update.model
    weights = sum(value.nbytes for value in model.state_dict().values())
    moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    average = sum(value.nbytes for value in run.average.values.values()) if run.average else 0
    return Estimate(
        pairs=len(run.batches.plan.pairs.rows),
        teachers=teachers.slugs if teachers else (),
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
    )
