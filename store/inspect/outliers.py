"""Sampled rows that teachers find odd: a caption that does not fit its image, a feature of unusual length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.store.inspect.pairs import sound_pairs
from mmkd.store.inspect.sampling import unit

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

MIN_ROWS = 20
"""Minimum rows for outliers."""


@dataclass(frozen=True)
class Outlier:
    """One odd row."""

    row: int
    kind: Literal["caption fits least", "image norm", "caption norm"]
    """The first names the last rows of an order, which are not wrong for that: see `score`."""
    score: float
    """Mean over teachers of standard scores: (value - median) / (1.4826 x median absolute deviation)."""
    cosine: float
    """Mean image-caption cosine over the teachers."""
    teachers: int
    """That have the row."""


def outliers(store: FeatureStore, slugs: Sequence[str], rows: NDArray[np.int64], each: int = 8) -> tuple[Outlier, ...]:
    """Return the rows that stand out most, of each kind the first `each`. Robust scores: what is odd must not make
    itself usual. Norms are compared by their logarithm. Raises UserError if there is no such teacher.

    Args:
        store: the store.
        slugs: teachers; their scores are averaged.
        rows: int64 (n,) ascending, the sample.
        each: rows of each kind; of norms only those with a score beyond 4.
    """
    scores = {kind: np.full((len(slugs), len(rows)), np.nan) for kind in ("cosine", "image", "text")}
    cosines = np.full((len(slugs), len(rows)), np.nan)
    for i, slug in enumerate(slugs):
        image, text, sound = sound_pairs(store, slug, rows)
        if np.count_nonzero(sound) < MIN_ROWS:
            continue
        cosines[i, sound] = np.einsum("nd,nd->n", unit(image[sound]), unit(text[sound]))
        scores["cosine"][i, sound] = standard_scores(cosines[i, sound])
        for name, values in (("image", image), ("text", text)):
            scores[name][i, sound] = standard_scores(np.log(np.linalg.norm(values[sound].astype(np.float64), axis=1)))
    there = np.isfinite(cosines).sum(axis=0)
    means = {name: _mean(values) for name, values in scores.items()}
    fit = _mean(cosines)
    picked: list[Outlier] = []
    worst = [int(i) for i in np.argsort(means["cosine"], kind="stable")[:each] if means["cosine"][i] < 0]
    picked += [
        Outlier(int(rows[i]), "caption fits least", float(means["cosine"][i]), float(fit[i]), int(there[i]))
        for i in worst
    ]
    kinds: tuple[tuple[str, Literal["image norm", "caption norm"]], ...] = (
        ("image", "image norm"),
        ("text", "caption norm"),
    )
    for name, kind in kinds:
        far = np.argsort(-np.nan_to_num(np.abs(means[name])), kind="stable")[:each]
        picked += [
            Outlier(int(rows[i]), kind, float(means[name][i]), float(fit[i]), int(there[i]))
            for i in far
            if abs(means[name][i]) > 4
        ]
    return tuple(picked)


def standard_scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance from the median in units of 1.4826 times the median absolute deviation: robust against the
    odd ones."""
    middle = np.median(values)
    # 1.4826 makes the median absolute deviation that of a normal distribution. Unit norms differ by rounding alone:
    # a spread below a thousandth is none.
    spread = max(1.4826 * float(np.median(np.abs(values - middle))), 1e-3)
    return np.asarray((values - middle) / spread, dtype=np.float64)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    count = np.isfinite(values).sum(axis=0)
    total = np.nansum(values, axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
