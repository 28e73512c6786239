"""Bootstrap resamples of whole groups, the same for every model that answers the same samples."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmkd.base.config import Frozen
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions

BLOCK_ELEMENTS = 1 << 20
"""Counts held at a time: 8 MiB of float64, little enough for the cache and enough to sort seldom."""


class BootstrapSettings(Frozen):
    """Percentile intervals from resampled groups (patients when the data set names them, else samples)."""

    n: int = Field(default=1000, ge=100)
    """Resamples. 1000 settles the second digit of a 95 % limit; use 5000 for a paper."""
    seed: int = Field(default=42, ge=0)
    level: float = Field(default=0.95, gt=0.5, lt=1.0)


def clustered_resamples(predictions: Predictions, settings: BootstrapSettings, name: str) -> Iterator[Floats]:
    """Draw as many groups as there are with replacement, each with all its rows, available or not (Davison and Hinkley
    1997, section 3.8); yield counts, float64 (b, n), in blocks that add up to `settings.n`. The draws depend on the
    seed, the groups and `name` only, never on the model, so differences between models are paired."""
    _, member = np.unique(predictions.group.astype(str), return_inverse=True)
    yield from group_counts(member.astype(np.int64), settings.n, [settings.seed, *name_words(name)])


def group_counts(member: NDArray[np.int64], n: int, seed: int | list[int]) -> Iterator[Floats]:
    """Yield counts of rows in n resamples of groups. `member`: int64 (rows,), the group of every row, 0 to G - 1."""
    rng = np.random.default_rng(seed)
    groups = int(member.max(initial=-1)) + 1
    step = max(1, BLOCK_ELEMENTS // max(1, len(member)))
    for start in range(0, n, step):
        b = min(step, n - start)
        drawn = rng.integers(0, max(1, groups), size=(b, groups)) + np.arange(b)[:, None] * groups
        counts = np.bincount(drawn.reshape(-1), minlength=b * groups).reshape(b, groups)
        # Laid out one sample a row, as `metrics.auroc` reads it; handed out as (b, rows).
        yield counts.T[member].astype(np.float64).T


def name_words(name: str) -> list[int]:
    """Return the name as seed words: the same on every machine, unlike `hash`."""
    return list(struct.unpack("<8I", hashlib.sha256(name.encode()).digest()))
