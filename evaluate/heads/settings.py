"""Settings of trained heads, kept apart from torch; the length of a training counts in steps of the optimizer."""

import math
from typing import NamedTuple

from pydantic import Field

from mmkd.base.config import Frozen


class Trained(NamedTuple):
    """Outcome of a training: the epoch with the lowest validation loss, whose weights stay, from 1; and the most epochs
    of the budget."""

    epoch: int
    limit: int


class TrainingBudget(Frozen):
    """Length of a training in steps of the optimizer, so that a small set is trained while a large one."""

    lr: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=1e-5, ge=0)
    steps: int = Field(default=2000, ge=1)
    """Steps of the optimizer; at least ten epochs in any case."""
    epochs: int | None = Field(default=None, ge=1)
    """Most epochs; by default as many as make up `steps`."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a lower validation loss before training stops; by default a fifth of the epochs, at least 5.
    The weights of the best epoch stay."""
    batch: int = Field(default=16, ge=1)
    """Samples a step."""

    def limits(self, samples: int) -> tuple[int, int]:
        """Return most epochs, and the patience in epochs, of a training set of this size."""
        steps_per_epoch = math.ceil(max(samples, 1) / self.batch)
        epochs = self.epochs or max(10, math.ceil(self.steps / steps_per_epoch))
        return epochs, self.patience or max(5, math.ceil(epochs / 5))


class FusionSettings(TrainingBudget):
    """One hidden layer over an image feature and a question feature."""

    hidden: int = Field(default=1024, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=128, ge=1)


class MilSettings(TrainingBudget):
    """Attention-based multiple-instance learning (Ilse et al. 2018) as CLAM-style pipelines train it."""

    hidden: int = Field(default=512, ge=1)
    attention: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.25, ge=0, lt=1)
    max_patches: int = Field(default=4096, ge=1)
    """Patches drawn of a larger bag in each training step; a test bag is always whole."""


def budget_warnings(trainings: list[Trained]) -> list[str]:
    """Return a warning where the last epoch of the budget was the best: a longer training may score higher."""
    late = sum(one.epoch == one.limit for one in trainings)
    return [f"the last epoch was the best in {late} of {len(trainings)} trainings; raise `steps`"] if late else []
