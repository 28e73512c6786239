"""Which rows make which batch: a pure function of (seed, epoch, position). Ranks and workers have no say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def epoch_order(rows: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """The rows of one epoch in their shuffled order; int64 (n,).

    The generator is counter-based (Philox) and keyed by seed and epoch, so any epoch's order is had
    without running those before it.
    """
    return rows[_generator(seed, epoch, 0).permutation(len(rows))]


def bucketed(
    order: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, window: int, key: tuple[int, int]
) -> NDArray[np.int64]:
    """Put rows of like caption length into one batch; int64 (whole batches * batch_size,).

    Within every `window` batches of the shuffled order, rows are sorted by length (ties stay shuffled), cut into
    batches, and the batches shuffled: a batch is random among the rows of its length, and its place is random.

    Args:
        order: int64 (n,), shuffled rows.
        lengths: int64 (n,), caption length of each row of `order`.
        batch_size: rows of a batch.
        window: batches that are sorted together; 0 leaves the order as it is.
        key: seed and epoch.
    """
    count = len(order) // batch_size
    if window == 0:
        return order[: count * batch_size]
    generator = _generator(*key, 1)
    batches = []
    for first in range(0, count, window):
        span = slice(first * batch_size, min(first + window, count) * batch_size)
        by_length = order[span][np.argsort(lengths[span], kind="stable")].reshape(-1, batch_size)
        batches.append(by_length[generator.permutation(len(by_length))])
    return np.concatenate(batches).reshape(-1) if batches else order[:0]


def share(batch: NDArray[np.int64], rank: int, ranks: int) -> NDArray[np.int64]:
    """One rank's part of a batch: consecutive rows, so that all parts in order of rank are the batch."""
    part = len(batch) // ranks
    return batch[rank * part : (rank + 1) * part]


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    # The purpose in the upper half of the second word: epochs never come near 2**32.
    key = np.array([seed, epoch + (purpose << 32)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class Schedule:
    """Steps of a run: whole batches only, the rest of an epoch is left out (it is another rest each epoch)."""

    rows: int
    batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""
        return self.rows // self.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def place(self, step: int) -> tuple[int, int]:
        """Epoch and batch number within it of a step, both from 0."""
        return divmod(step, self.steps_per_epoch)


def batch_rows(order: NDArray[np.int64], batch: int, batch_size: int) -> NDArray[np.int64]:
    """The rows of one batch of an epoch's order."""
    return order[batch * batch_size : (batch + 1) * batch_size]
