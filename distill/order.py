"""Which rows make which batch: a pure function of (seed, epoch, position)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def epoch_order(rows: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """The rows of one epoch in their shuffled order; int64 (n,).

    The generator is counter-based (Philox) and keyed by seed and epoch, so any epoch's order is had
    without running those before it.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return rows[generator.permutation(len(rows))]


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
