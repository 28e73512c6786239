"""The training loop: steps, validations, checkpoints, and early ends by a signal, patience or a bad loss."""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from mmkd.base.errors import UserError
from mmkd.base.files import write_atomically
from mmkd.base.lock import only_writer
from mmkd.base.process import keep_freed_memory, loaded_objects_frozen
from mmkd.distill.batches import Batch
from mmkd.distill.checkpoint import Progress
from mmkd.distill.config import RunConfig
from mmkd.distill.logs import Board, Clock, open_boards
from mmkd.distill.optimizer import lr_factor, set_learning_rate, warmup_steps
from mmkd.distill.prepare import prepare
from mmkd.distill.run import Run
from mmkd.distill.train_step import Outcome
from mmkd.distill.world import World, join_ranks

BAD_BATCH = "bad-batch.json"


@dataclass(frozen=True)
class TrainReport:
    """Summary of one call."""

    steps: int
    """Steps of the run so far."""
    resumed_at: int
    """Step at which this call began."""
    rows: int
    seconds: float
    wait_seconds: float
    """Part of them spent waiting for images and features."""
    losses: dict[str, float]
    """Losses of the last step by term."""
    scores: dict[str, float]
    """Scores of the last validation."""
    best: Progress
    stopped: str
    """Reason for ending before the last step: a signal's name or `patience`; else empty."""
    stop_signal: int
    """The signal's number, when it was one."""
    first_rank: bool
    """False in ranks that print nothing."""

    @property
    def line(self) -> str:
        """The call as a user reads it."""
        steps = self.steps - self.resumed_at
        if not steps:
            done = f"ended at step {self.steps}" if self.stopped else f"all {self.steps} steps were done before"
            more = "patience" if self.stopped else "`epochs`"
            return f"{done}: nothing to do; for more, set another `out` and {more}"
        terms = ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        share = self.wait_seconds / self.seconds if self.seconds else 0.0
        whole = f" ({self.steps} in all)" if self.resumed_at else ""
        return f"{steps} steps{whole} in {self.seconds:.0f} s, {share:.0%} of it waiting for data; losses: {terms}"


def train(config: RunConfig, say: Callable[[str], None] = print) -> TrainReport:
    """Train the student of `config`, from the run's last checkpoint when there is one. Raises BusyStoreError if another
    process writes to `out`; ConfigError, UserError, IncompleteStoreError if store and configuration do not fit each
    other; UserError at a loss that is not finite, with its rows in `bad-batch.json`."""
    with (
        join_ranks(config.compute.timeout_minutes) as world,
        stop_on(config.checkpoints.stop_signals) as signals,
        _only_run(config, world),
    ):
        if world.device.type == "cpu":
            keep_freed_memory()
        run = prepare(config, world)
        run.begin()
        if world.first:
            for line in (run.headline, *run.notes()):
                say(line)
        with open_boards(run) as log, loaded_objects_frozen():
            return _loop(run, log, signals)


@contextmanager
def _only_run(config: RunConfig, world: World) -> Iterator[None]:
    """Lock the run folder, in the first rank for all; no rank reads the folder before it is locked."""
    if config.out.is_file() or (config.out / "zarr.json").is_file():
        what = "a file" if config.out.is_file() else "a store"
        raise UserError(f"out: {config.out} is {what}; name a folder of its own for the run")
    with only_writer(config.out, "mmkd distill") if world.first else nullcontext():
        world.highest(0)
        yield


def _loop(run: Run, log: Board, signals: list[signal.Signals]) -> TrainReport:
    config, first, total = run.config, run.progress.step, run.schedule.total_steps
    warmup = warmup_steps(config.optimizer, total)
    clock, guard, progress = Clock(), FiniteGuard(run), run.progress
    losses: dict[str, float] = {}
    scores: dict[str, float] = {}
    # A run ended by patience takes no more steps.
    stopped, number = _out_of_patience(config, progress), 0
    with closing(run.batches), closing(run.batches.from_step(first)) as batches:
        while progress.step < total and not stopped:
            with clock.waiting():
                batch = next(batches)
            lr = config.optimizer.lr * lr_factor(batch.step, warmup, total)
            set_learning_rate(run.update.optimizer, lr)
            outcome = run.update(batch)
            guard.check_before((batch, outcome))
            if run.average is not None:
                run.average.update(run.update.model.towers, batch.step)
            clock.samples += config.batch_size
            progress = replace(progress, step=batch.step + 1)
            last = progress.step == total
            if last or batch.step % config.logging.every_steps == 0:
                losses = outcome.values()
                rates = clock.lap(run.world.device) | {"lr": lr, "gradient_norm": outcome.norm.item()}
                rates |= run.arithmetic.rates(rates["samples_per_second"]) | batch.counts(run.world)
                log(batch.step, {f"loss/{name}": value for name, value in losses.items()} | rates)
            if run.monitor.sets and (last or progress.step % config.monitor.every_steps == 0):
                guard.check_before(None)
                scores = run.monitor.scores()
                log(batch.step, {f"monitor/{name}": value for name, value in scores.items()})
                progress = progress.after_validation(scores, config.monitor.chosen_metric)
            stopped = _out_of_patience(config, progress)
            number = run.world.highest(int(signals[-1]) if signals else 0)
            if number:
                stopped = signal.Signals(number).name
            due = progress.step % config.checkpoints.every_steps == 0 or progress.best_step == progress.step
            if last or stopped or due:
                guard.check_before(None)
                run.save(progress)
    return TrainReport(
        steps=progress.step, resumed_at=first, rows=len(run.batches.pairs.rows), seconds=clock.seconds,
        wait_seconds=clock.wait_seconds, losses=losses, scores=scores, best=progress, stopped=stopped,
        stop_signal=number, first_rank=run.world.first,
    )  # fmt: skip


def _out_of_patience(config: RunConfig, progress: Progress) -> str:
    patience = config.monitor.patience
    return "patience" if patience is not None and progress.worse >= patience else ""


class FiniteGuard:
    """Ends the run at a loss or gradient that is not finite, names the batch and saves nothing of it. A step is checked
    while the next one runs, so that the device never waits."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.last: tuple[Batch, Outcome] | None = None

    def check_before(self, step: tuple[Batch, Outcome] | None) -> None:
        """Check the last step and keep this one for the next call; None before anything is written or measured. Raises
        UserError if loss or gradient is NaN or infinite; the last checkpoint is from before."""
        last, self.last = self.last, step
        if last is None or last[1].finite():
            return
        (batch, outcome), world, path = last, self.run.world, self.run.config.out / BAD_BATCH
        # Every rank sees the same sums, so all get here together.
        rows = world.gather(torch.from_numpy(batch.rows).to(world.device)).tolist()
        if world.first:
            note = {"step": batch.step, "epoch": batch.epoch, "rows": rows, "losses": repr(outcome.values())}
            write_atomically(path, json.dumps(note).encode())
        raise UserError(
            f"loss is {outcome.total.item()}, gradient norm {outcome.norm.item()} at step {batch.step} (epoch "
            f"{batch.epoch}), rows {', '.join(map(str, rows[:5]))}, ... (all in {path}); "
            "lower optimizer.lr, or look at these rows; nothing was saved since the last checkpoint"
        )


@contextmanager
def stop_on(names: Sequence[str]) -> Iterator[list[signal.Signals]]:
    """Collect these signals instead of ending by them; a second one acts as usual. Threads cannot catch signals."""
    received: list[signal.Signals] = []
    numbers = [signal.Signals[name] for name in names if threading.current_thread() is threading.main_thread()]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, before[received[-1]])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
