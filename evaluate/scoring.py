"""Scoring: the metrics of a task's predictions, how they are resampled and how they are printed."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from mmkd.base.arrays import Bools, Floats, Ints
from mmkd.base.config import Frozen
from mmkd.evaluate import metrics
from mmkd.evaluate.metrics import Labels
from mmkd.evaluate.predictions import Predictions

BLOCK_ELEMENTS = 1 << 20
"""Counts held at a time: 8 MiB of float64, little enough for the cache and enough to sort seldom."""
Score = Callable[[Predictions, Floats], Floats]
"""Predictions of n available rows and counts (B, n) to values (B,); NaN where undefined."""
Contrast = tuple[Bools, Bools]
"""Rows on both sides of what a metric compares, such as positives and negatives, bool (n,) each."""


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


def group_counts(member: Ints, n: int, seed: int | list[int]) -> Iterator[Floats]:
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


@dataclass(frozen=True)
class Metric:
    """How predictions are scored. lower: lower is better. share: of one, and printed in percent. mean: over samples;
    at 0 and 100 % its interval is Wilson's. centered: chance enlarges it (distances, the largest of several), so that
    resamples, which add chance to chance, are moved until their mean is the value. rows: which it is of, bool (n,), if
    not all. contrasts: in place of the scoring's. undefined: what it needs to have a value."""

    score: Score
    lower: bool = False
    share: bool = True
    mean: bool = False
    centered: bool = False
    rows: Callable[[Predictions], Bools] | None = None
    contrasts: Callable[[Predictions], Sequence[Contrast]] | None = None
    undefined: str = "has no value on these labels"

    def __call__(self, found: Predictions, weights: Floats) -> Floats:
        return self.score(found, weights)


@dataclass(frozen=True)
class Scoring:
    """Metrics of a task's predictions by name, and how they are resampled."""

    protocol: str
    metrics: dict[str, Metric]
    primary: str
    resamples: Callable[[Predictions, BootstrapSettings, str], Iterator[Floats]] = clustered_resamples
    contrasts: Callable[[Predictions], Sequence[Contrast]] = lambda _: ()
    """Contrasts that every metric but means over samples is a mean over: an interval needs groups on both sides."""


def class_contrasts(found: Predictions) -> list[Contrast]:
    """Each class that occurs against the rest; a single contrast of two classes."""
    labels = found.labels()
    masks = [labels == label for label in np.unique(labels)]
    return [(mask, ~mask) for mask in masks[: 1 if len(masks) == 2 else None]]


def _of_labels(metric: Callable[[Labels, Floats, Floats], Floats]) -> Score:
    return lambda predictions, weights: metric(predictions.labels(), predictions.score, weights)


STANDARD = Scoring(
    "standard",
    {
        "acc": Metric(_of_labels(metrics.accuracy), mean=True),
        "bacc": Metric(_of_labels(metrics.balanced_accuracy)),
        "f1_macro": Metric(_of_labels(metrics.macro_f1)),
        "auroc_macro": Metric(_of_labels(metrics.macro_auroc)),
    },
    "auroc_macro",
    contrasts=class_contrasts,
)
"""Scoring of single-label classification; a table never averages two of its metrics. `acc` is a mean over samples."""
