"""Batches and their source: rows in order, their images, tokens and targets, one step ahead of the loop. Shapes: B rows
of this rank, L tokens."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.distill.fetch_ahead import FetchAhead
from mmkd.distill.further_captions import TrainingCaptions
from mmkd.distill.images import Pictures
from mmkd.distill.order import Windows, epoch_places
from mmkd.distill.pairs import Pairs
from mmkd.distill.teacher_features import TeacherFeatures, TeacherTargets
from mmkd.distill.views import TrainingViews
from mmkd.distill.world import World

Item = TypeVar("Item")
Piece = tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]
"""Images, tokens and columns of some rows: the arguments of the student's towers."""
Choose = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Epoch, positions int64 (B,) and available teachers bool (B, T) to shares (B, T)."""


@dataclass(frozen=True)
class Batch:
    """This rank's share of one step; the shares of all ranks, in order of rank, are the step's batch. rows: int64 (B,)
    grid rows. positions: int64 (B,), place of each row in its epoch's order. images: uint8 (I, 3, H, W) of the I rows
    with one. tokens: int64 (J, L) of the J rows with a caption, padded to the context. columns: (J,), how many of the L
    columns each needs. groups: int64 (B, 2), numbers of the row's tokens and of its image, -1 for none: pairs that
    share either are positives of each other. targets: one for each teacher, in the order of the run's teachers; empty
    when no teacher is asked. has: bool (B, 2), which rows have an image, a caption; None when all have both."""

    step: int
    epoch: int
    rows: NDArray[np.int64]
    positions: torch.Tensor
    images: torch.Tensor
    tokens: torch.Tensor
    columns: tuple[int, ...]
    groups: torch.Tensor
    targets: tuple[TeacherTargets, ...]
    has: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self, size: int) -> Iterator[Piece]:
        """Yield `size` images and tokens with columns at a time, for towers that cannot hold the whole share."""
        for first in range(0, max(len(self.images), len(self.tokens)), size):
            span = slice(first, first + size)
            yield self.images[span], self.tokens[span], self.columns[span]

    def counts(self, world: World) -> dict[str, float]:
        """Count pairs, lone images and lone texts of all ranks; nothing when all rows are pairs."""
        if self.has is None:
            return {}
        image, text = self.has.unbind(1)
        found = world.sum(torch.stack([(image & text).sum(), (image & ~text).sum(), (text & ~image).sum()])).tolist()
        return dict(zip(("rows/pairs", "rows/lone_images", "rows/lone_texts"), map(float, found), strict=True))

    def spread(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features of the images (I, D) and of the tokens (J, D) as (B, D) each, 0 for rows without."""
        if self.has is None:
            return image, text
        blank = image.new_zeros(len(self), image.shape[1])
        masks = self.has[:, :, None].expand(-1, -1, image.shape[1]).unbind(1)
        return blank.masked_scatter(masks[0], image), blank.masked_scatter(masks[1], text)

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`; from pinned memory without waiting."""
        names: tuple[str, ...] = ("positions", "images", "tokens", "groups")
        names += () if self.has is None else ("has",)
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


def share(batch: NDArray[np.int64], rank: int, ranks: int) -> NDArray[np.int64]:
    """Return one rank's part of a batch: consecutive rows, so that all parts in order of rank are the batch."""
    part = len(batch) // ranks
    return batch[rank * part : (rank + 1) * part]


@dataclass(frozen=True)
class BatchPlan:
    """Assignment of rows, int64 (n,), to steps: a function of seed, epoch and position, equal in all ranks and
    workers."""

    rows: NDArray[np.int64]
    schedule: Schedule
    seed: int
    windows: Windows | None = None
    """The order; a random one of all rows when not given."""

    def steps(self, first: int) -> Iterator[tuple[int, int, int, NDArray[np.int64]]]:
        """Yield step, epoch, position in the epoch of the batch's first row, and rows int64 (batch_size,)."""
        size = self.schedule.batch_size
        for step in range(first, self.schedule.total_steps):
            epoch, number = self.schedule.place(step)
            positions = np.arange(number * size, (number + 1) * size)
            if self.windows is not None:
                places = self.windows.places(positions, epoch)
            else:
                places = epoch_places(positions, len(self.rows), self.seed, epoch)
            yield step, epoch, number * size, self.rows[places]


@dataclass(frozen=True)
class Batches:
    """All that a step needs, for one rank."""

    plan: BatchPlan
    pairs: Pairs
    pictures: Pictures
    teachers: TeacherFeatures | None
    workers: int
    world: World
    choose: Choose | None = None
    """Which teachers' features are read; all when not given."""
    ahead: FetchAhead | None = None
    """Of a store behind a URL."""
    views: TrainingViews | None = None
    choices: TrainingCaptions | None = None

    def from_step(self, first: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches from step `first` on, with workers one ahead. Raises UserError if an image is
        gone."""
        world, pairs = self.world, self.pairs
        parts = ((epoch, share(rows, world.rank, world.size)) for _, epoch, _, rows in self._reached(first))
        wanted = ((epoch, rows[pairs.groups[pairs.numbers(rows), 1] >= 0]) for epoch, rows in parts)
        # Here, not in the thread below: a process forked from an executor's thread joins that thread, itself, when it
        # ends, fails at it, and its exit status stops the run.
        made = self._assemble(first, self.pictures(wanted, self.plan.seed, self.workers))
        # Without workers, crops are drawn from this process' own generator: in a thread they would race with dropout.
        return one_ahead(made, world.device) if self.workers else made

    def _reached(self, first: int) -> Iterator[tuple[int, int, int, NDArray[np.int64]]]:
        """Yield the plan's steps, each when what it needs is on its way."""
        for step in self.plan.steps(first):
            if self.ahead is not None:
                self.ahead(step[1], range(step[2], step[2] + len(step[3])))
            yield step

    def close(self) -> None:
        """Fetch nothing more of a store behind a URL. For whoever made the run: `from_step` may be called again."""
        if self.ahead is not None:
            self.ahead.close()

    def _assemble(self, first: int, pixels: Iterator[torch.Tensor]) -> Generator[Batch, None, None]:
        world, pairs = self.world, self.pairs
        for images, (step, epoch, start, all_rows) in zip(pixels, self.plan.steps(first), strict=True):
            rows = share(all_rows, world.rank, world.size)
            numbers = pairs.numbers(rows)
            groups = pairs.groups[numbers]
            has = torch.from_numpy(groups[:, ::-1] >= 0)
            captions = numbers[groups[:, 0] >= 0]
            tokens, columns = pairs.captions.tokens(captions), pairs.captions.columns(captions)
            images_of = None if self.views is None else self.views.view_rows(self.plan.seed, epoch, rows)
            texts_of = None
            if self.choices is not None:
                texts_of, chosen = self.choices.choose(self.plan.seed, epoch, rows)
                tokens, columns = self.choices.instead(chosen[groups[:, 0] >= 0], tokens, columns)
                groups[chosen >= 0, 0] = self.choices.numbers[chosen[chosen >= 0]]
            positions = torch.arange(start + world.rank * len(rows), start + (world.rank + 1) * len(rows))
            targets: tuple[TeacherTargets, ...] = ()
            if self.teachers is not None:
                wanted = None
                if self.choose is not None:
                    there = torch.from_numpy(self.teachers.present(rows, images_of, texts_of)) & has[:, None]
                    wanted = self.choose(epoch, positions, there.any(2)) > 0
                targets = self.teachers.gather(rows, wanted, images=images_of, texts=texts_of)
            batch = Batch(
                step=step,
                epoch=epoch,
                rows=rows,
                positions=positions,
                images=images,
                tokens=tokens,
                columns=columns,
                groups=torch.from_numpy(groups),
                targets=targets if pairs.all_paired else tuple(target.masked(has) for target in targets),
                has=None if pairs.all_paired else has,
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
