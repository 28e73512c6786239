"""Batches and their source: rows in order, their images, tokens and targets, one step ahead of the loop. Shapes: B rows
of this rank, L tokens."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.distill.images import Pictures
from mmkd.distill.pairs import Captions, Pairs
from mmkd.distill.teacher_features import TeacherFeatures, TeacherTargets
from mmkd.distill.world import World

Item = TypeVar("Item")
Piece = tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]
"""Images, tokens and columns of some rows: the arguments of the student's towers."""


@dataclass(frozen=True)
class Batch:
    """This rank's share of one step; the shares of all ranks, in order of rank, are the step's batch. rows: int64 (B,)
    grid rows. positions: int64 (B,), place of each row in its epoch's order. images: uint8 (B, 3, H, W). tokens: int64
    (B, L), padded to the context. columns: (B,), how many of the L columns each row needs. groups: int64 (B, 2),
    numbers of the row's tokens and of its image: rows that share either are positives of each other. targets: one for
    each teacher, in the order of the run's teachers; empty when no teacher is asked."""

    step: int
    epoch: int
    rows: NDArray[np.int64]
    positions: torch.Tensor
    images: torch.Tensor
    tokens: torch.Tensor
    columns: tuple[int, ...]
    groups: torch.Tensor
    targets: tuple[TeacherTargets, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self, size: int) -> Iterator[Piece]:
        """Yield images, tokens and columns of `size` rows at a time, for towers that cannot hold the whole share."""
        for first in range(0, len(self), size):
            span = slice(first, first + size)
            yield self.images[span], self.tokens[span], self.columns[span]

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device`; from pinned memory without waiting."""
        names = ("positions", "images", "tokens", "groups")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, targets=tuple(target.to(device) for target in self.targets), **moved)


@dataclass(frozen=True)
class Schedule:
    """Steps of a run: whole batches only. Each epoch leaves out another remainder."""

    rows: int
    batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def place(self, step: int) -> tuple[int, int]:
        """Return epoch and batch number within it of a step, both from 0."""
        return divmod(step, self.steps_per_epoch)


def epoch_order(rows: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the rows of one epoch, int64 (n,), in random order: a batch depends on no property of its rows. The
    generator (Philox) is counter-based and keyed by seed and epoch, so no epoch needs those before it."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return rows[np.random.Generator(np.random.Philox(key=key)).permutation(len(rows))]


def share(batch: NDArray[np.int64], rank: int, ranks: int) -> NDArray[np.int64]:
    """Return one rank's part of a batch: consecutive rows, so that all parts in order of rank are the batch."""
    part = len(batch) // ranks
    return batch[rank * part : (rank + 1) * part]


@dataclass(frozen=True)
class BatchPlan:
    """Assignment of rows to steps: a function of seed, epoch and position, equal in all ranks and workers."""

    pairs: Pairs
    schedule: Schedule
    seed: int

    def steps(self, first: int) -> Iterator[tuple[int, int, int, NDArray[np.int64]]]:
        """Yield step, epoch, position in the epoch of the batch's first row, and rows int64 (batch_size,)."""
        size, drawn = self.schedule.batch_size, -1
        for step in range(first, self.schedule.total_steps):
            epoch, number = self.schedule.place(step)
            if epoch != drawn:
                order, drawn = epoch_order(self.pairs.rows, self.seed, epoch), epoch
            yield step, epoch, number * size, order[number * size : (number + 1) * size]


@dataclass(frozen=True)
class Batches:
    """All that a step needs, for one rank."""

    plan: BatchPlan
    captions: Captions
    pictures: Pictures
    groups: NDArray[np.int64]
    """Numbers of tokens and image of each pair, (n, 2)."""
    teachers: TeacherFeatures | None
    workers: int
    world: World

    def from_step(self, first: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches from step `first` on, with workers one ahead. Raises UserError if an image is
        gone."""
        world = self.world
        wanted = ((epoch, share(rows, world.rank, world.size)) for _, epoch, _, rows in self.plan.steps(first))
        # Here, not in the thread below: a process forked from an executor's thread joins that thread, itself, when it
        # ends, fails at it, and its exit status stops the run.
        made = self._assemble(first, self.pictures(wanted, self.plan.seed, self.workers))
        # Without workers, crops are drawn from this process' own generator: in a thread they would race with dropout.
        return one_ahead(made, world.device) if self.workers else made

    def _assemble(self, first: int, pixels: Iterator[torch.Tensor]) -> Generator[Batch, None, None]:
        world = self.world
        for images, (step, epoch, start, all_rows) in zip(pixels, self.plan.steps(first), strict=True):
            rows = share(all_rows, world.rank, world.size)
            places = self.plan.pairs.places(rows)
            captions = self.plan.pairs.caption[places]
            batch = Batch(
                step=step,
                epoch=epoch,
                rows=rows,
                positions=torch.arange(start + world.rank * len(rows), start + (world.rank + 1) * len(rows)),
                images=images,
                tokens=self.captions.tokens(captions),
                columns=self.captions.columns(captions),
                groups=torch.from_numpy(self.groups[places]),
                targets=self.teachers.gather(rows) if self.teachers is not None else (),
            )
            yield batch.to(world.device)


def one_ahead(items: Generator[Item, None, None], device: torch.device | None = None) -> Generator[Item, None, None]:
    """Yield the same items, each made in a thread while the one before is used; errors of making one are raised
    here."""
    # Which device is the current one is known to each thread alone; without this every rank would pin for the first.
    start = partial(torch.cuda.set_device, device) if device is not None and device.type == "cuda" else None
    with closing(items), ThreadPoolExecutor(1, "mmkd-batches", initializer=start) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
