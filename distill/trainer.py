"""The loop, and nothing but the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from signal import Signals

from mmkd.distill.batch import Batch
from mmkd.distill.board import Boards, Clock, opened_boards
from mmkd.distill.checkpoint import CONFIG, Progress
from mmkd.distill.config import RunConfig
from mmkd.distill.optimiser import lr_factor, set_learning_rate
from mmkd.distill.prepare import Run, prepare
from mmkd.distill.stop import StopRequest, stop_on
from mmkd.distill.update import Outcome
from mmkd.distill.world import started_world
from mmkd.store.atomic import write_atomically
from mmkd.store.errors import UserError
from mmkd.store.malloc import keep_freed_memory

BAD_BATCH = "bad-batch.json"


@dataclass(frozen=True)
class TrainReport:
    """What a run did."""

    steps: int
    """Done in the whole run."""
    resumed_at: int
    """Step at which this call began."""
    rows: int
    parameters: int
    """Of the student alone."""
    seconds: float
    wait_seconds: float
    """Of them, spent waiting for images and features."""
    losses: dict[str, float]
    """Of the last step, by term."""
    scores: dict[str, float]
    """Of the last validation."""
    best: Progress
    stopped: str = ""
    """Why the run ended before its last step: a signal's name, or `patience`; empty when it did not."""
    stop_signal: int = 0
    """The signal's number, when it was one."""
    first_rank: bool = True
    """False in the ranks that have nothing to say."""


def train(config: RunConfig, say: Callable[[str], None] = print) -> TrainReport:
    """Train the student of `config`, from its last checkpoint when there is one.

    Raises:
        ConfigError, UserError, IncompleteStoreError: see `mmkd.store.errors`. A loss that is not finite
        stops the run with the step named and its rows listed in `bad-batch.json`.
    """
    with started_world(config.compute.timeout_minutes) as world, stop_on(config.checkpoints.stop_signals) as request:
        if world.device.type == "cpu":
            keep_freed_memory()
        run = prepare(config, world)
        first, total = run.progress.step, run.schedule.total_steps
        if world.first:
            write_atomically(config.out / CONFIG, config.model_dump_json(indent=1).encode())
            say(_headline(run))
        with opened_boards(config, world, first, total) as boards:
            return _loop(run, boards, request)


def _loop(run: Run, boards: Boards, request: StopRequest) -> TrainReport:
    config, first, total = run.config, run.progress.step, run.schedule.total_steps
    clock, guard, progress = Clock(), _FiniteGuard(run), run.progress
    losses: dict[str, float] = {}
    scores: dict[str, float] = {}
    stopped, number = "", 0
    with closing(run.batches.from_step(first)) as batches:
        while progress.step < total and not stopped:
            with clock.waiting():
                batch = next(batches)
            lr = config.optimiser.lr * lr_factor(batch.step, config.optimiser.warmup_steps, total)
            set_learning_rate(run.update.optimiser, lr)
            outcome = run.update(batch)
            guard.watch(batch, outcome)
            if run.average is not None:
                run.average.update(run.update.model.towers, batch.step)
            clock.add(config.batch_size)
            progress = replace(progress, step=batch.step + 1)
            last = progress.step == total
            if last or batch.step % config.logging.every_steps == 0:
                losses = outcome.values()
                rates = clock.lap(run.world.device) | {"lr": lr, "gradient_norm": outcome.norm.item()}
                boards.scalars(batch.step, {f"loss/{name}": value for name, value in losses.items()} | rates)
            if run.monitor.sets and (last or progress.step % config.monitor.every_steps == 0):
                guard.settle()
                scores = run.monitor.scores()
                boards.scalars(batch.step, {f"monitor/{name}": value for name, value in scores.items()})
                progress = _judged(progress, scores[run.monitor.metric])
            if config.monitor.patience is not None and progress.worse >= config.monitor.patience:
                stopped = "patience"
            number = run.world.highest(int(request.signal or 0))
            if number:
                stopped = Signals(number).name
            due = progress.step % config.checkpoints.every_steps == 0 or progress.best_step == progress.step
            if last or stopped or due:
                guard.settle()
                run.save(progress)
    return TrainReport(
        steps=progress.step, resumed_at=first, rows=len(run.batches.plan.pairs.rows), parameters=run.parameters,
        seconds=clock.seconds, wait_seconds=clock.wait_seconds, losses=losses, scores=scores, best=progress,
        stopped=stopped, stop_signal=number, first_rank=run.world.first,
    )  # fmt: skip


def _judged(progress: Progress, score: float) -> Progress:
    """The progress after a validation."""
    if progress.best_score is None or score > progress.best_score:
        return replace(progress, best_score=score, best_step=progress.step, worse=0)
    return replace(progress, worse=progress.worse + 1)


class _FiniteGuard:
    """Looks at each step's loss when the next one is under way, so that the device never waits for the look."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.last: tuple[Batch, Outcome] | None = None

    def watch(self, batch: Batch, outcome: Outcome) -> None:
        """Judge the step before; this one is judged at the next call, or by `settle`."""
        before, self.last = self.last, (batch, outcome)
        self._judge(before)

    def settle(self) -> None:
        """Judge the last step too: before anything is written or measured.

        Raises:
            UserError: loss or gradient is NaN or infinite. The last checkpoint is from before.
        """
        before, self.last = self.last, None
        self._judge(before)

    def _judge(self, step: tuple[Batch, Outcome] | None) -> None:
        if step is None or step[1].finite():
            return
        batch, outcome = step
        rows = batch.rows.tolist()
        if self.run.world.first:
            note = {"step": batch.step, "epoch": batch.epoch, "rows": rows} | {"losses": repr(outcome.values())}
            write_atomically(self.run.config.out / BAD_BATCH, json.dumps(note).encode())
        raise UserError(
            f"loss is {outcome.total.item()}, gradient norm {outcome.norm.item()} at step {batch.step} (epoch "
            f"{batch.epoch}), rows {', '.join(map(str, rows[:5]))}, ... (all in {self.run.config.out / BAD_BATCH}); "
            "lower optimiser.lr, or look at these rows; nothing was saved since the last checkpoint"
        )


def _headline(run: Run) -> str:
    teachers = run.batches.teachers
    return (
        f"{len(run.batches.plan.pairs.rows):,} pairs, {len(teachers.slugs) if teachers else 0} teachers, "
        f"student of {run.parameters / 1e6:.1f} M parameters, {run.schedule.total_steps:,} steps of "
        f"{run.config.batch_size} on {run.world.size} x {run.world.device.type}"
        + (f", from step {run.progress.step:,}" if run.progress.step else "")
    )
