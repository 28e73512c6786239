"""The loop, and nothing but the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from signal import Signals

from mmkd.base.process import keep_freed_memory
from mmkd.distill.checkpoint import Progress
from mmkd.distill.config import RunConfig
from mmkd.distill.logs import Boards, Clock, opened_boards
from mmkd.distill.nan_guard import FiniteGuard
from mmkd.distill.optimizer import lr_factor, set_learning_rate, warmup_steps
from mmkd.distill.prepare import Run, prepare
from mmkd.distill.probe import notes
from mmkd.distill.stop import StopRequest, stop_on
from mmkd.distill.world import started_world


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
        ConfigError, UserError, IncompleteStoreError: see `mmkd.base.errors`. A loss that is not finite
            stops the run with the step named and its rows listed in `bad-batch.json`.
    """
    with started_world(config.compute.timeout_minutes) as world, stop_on(config.checkpoints.stop_signals) as request:
        if world.device.type == "cpu":
            keep_freed_memory()
        run = prepare(config, world)
        first, total = run.progress.step, run.schedule.total_steps
        run.begin()
        if world.first:
            say(run.headline)
            for note in notes(run):
                say(note)
        with opened_boards(config, world, first, total) as boards:
            return _loop(run, boards, request)


def _loop(run: Run, boards: Boards, request: StopRequest) -> TrainReport:
    config, first, total = run.config, run.progress.step, run.schedule.total_steps
    warmup = warmup_steps(config.optimiser, total)
    clock, guard, progress = Clock(), FiniteGuard(run), run.progress
    losses: dict[str, float] = {}
    scores: dict[str, float] = {}
    stopped, number = "", 0
    with closing(run.batches.from_step(first)) as batches:
        while progress.step < total and not stopped:
            with clock.waiting():
                batch = next(batches)
            lr = config.optimiser.lr * lr_factor(batch.step, warmup, total)
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
                progress = _judged(progress, scores, run.monitor.metric)
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


def _judged(progress: Progress, scores: dict[str, float], metric: str) -> Progress:
    """The progress after a validation."""
    if progress.best_score is None or scores[metric] > progress.best_score:
        return replace(progress, best_score=scores[metric], best_step=progress.step, best_scores=scores, worse=0)
    return replace(progress, worse=progress.worse + 1)
