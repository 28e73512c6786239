"""Do a teacher's captions fit their images: cosines, retrieval, and whether the captions slipped by a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmkd.store.inspect.distribution import Distribution, distribution
from mmkd.store.inspect.sampling import truly_sound, unit
from mmkd.store.layout import PAIR_SOUND

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

POOL_ROWS = 1000
RANKS = (1, 10)
SHIFTS = (-2, -1, 0, 1, 2)


@dataclass(frozen=True)
class PairStatistics:
    """Images against captions of one teacher, over sampled rows where both are sound."""

    slug: str
    pairs: int
    """Rows of the sample with a sound image and a sound caption."""
    matched: Distribution
    """Cosine of an image with its own caption."""
    unmatched: Distribution
    """Cosine of an image with the captions of some other rows of its pool."""
    pool: int
    """Rows of a retrieval pool: 1000, or all pairs when there are fewer."""
    pools: int
    recall: dict[str, float]
    """`i2t@1`, `i2t@10`, `t2i@1`, `t2i@10`: share of rows whose own counterpart is among the first k of its pool; NaN
    when the pool has no more than k rows, where it could not be missed."""
    chance: dict[str, float]
    """What random features would reach, k / pool."""
    shift: dict[int, float]
    """Mean cosine of the image in row r with the caption in row r + s, by s. Largest at 0 when rows fit."""

    @property
    def best_shift(self) -> int:
        """The s whose mean cosine is clearly the largest; 0 when none beats the rows' own captions.

        Clearly: by five standard errors of a mean of unmatched cosines, which chance does not reach.
        """
        best = max(self.shift, key=lambda s: self.shift[s], default=0)
        # 1.349 standard deviations lie between the quartiles of a normal distribution.
        error = (self.unmatched.q75 - self.unmatched.q25) / 1.349 / math.sqrt(max(min(self.pairs, POOL_ROWS), 1))
        return best if best and self.shift[best] > self.shift.get(0, -2.0) + 5 * error else 0


def pair_statistics(store: FeatureStore, slug: str, rows: NDArray[np.int64], seed: int) -> PairStatistics:
    """Compare images and captions of one teacher.

    Args:
        store: the store.
        slug: teacher.
        rows: int64 (n,) ascending; those without a sound pair are left out.
        seed: shuffles rows into disjoint pools of 1000; rows left over join no pool.

    Raises:
        UserError: no such teacher.
    """
    image, text = store.image(slug), store.text(slug)
    rows = rows[store.valid(slug)[rows] == PAIR_SOUND]
    shuffled = np.random.default_rng(seed).permutation(rows)
    pool = min(POOL_ROWS, len(rows))
    pools = len(rows) // pool if pool else 0
    matched, unmatched = [np.empty(0)], [np.empty(0)]
    hits = dict.fromkeys((f"{way}@{k}" for way in ("i2t", "t2i") for k in RANKS), 0.0)
    scored = 0
    for index in range(pools):
        taken = shuffled[index * pool : (index + 1) * pool]
        sound = truly_sound(image[taken]) & truly_sound(text[taken])
        cosines = unit(image[taken[sound]]) @ unit(text[taken[sound]]).T
        scored += len(cosines)
        matched.append(np.diagonal(cosines))
        unmatched += [np.diagonal(np.roll(cosines, -offset, axis=1)) for offset in range(1, min(5, len(cosines)))]
        for way, table in (("i2t", cosines), ("t2i", cosines.T)):
            for k in RANKS:
                hits[f"{way}@{k}"] += float(hit_chance(table, k).sum())
    return PairStatistics(
        slug=slug,
        pairs=len(rows),
        matched=distribution(np.concatenate(matched), (-1.0, 1.0)),
        unmatched=distribution(np.concatenate(unmatched), (-1.0, 1.0)),
        pool=pool,
        pools=pools,
        recall={name: total / scored if scored and pool > _rank_of(name) else math.nan for name, total in hits.items()},
        chance={name: _rank_of(name) / pool if pool > _rank_of(name) else math.nan for name in hits},
        shift=_shifts(store, slug, rows[:POOL_ROWS]),
    )


def _rank_of(name: str) -> int:
    return int(name.partition("@")[2])


def hit_chance(cosines: NDArray[np.float32], k: int) -> NDArray[np.float64]:
    """For each row of a square table, how likely its diagonal entry is among the k largest, ties broken by lot.

    Equal captions give equal cosines: counting them for or against the row would make the figure depend on chance
    or on the order of rows. With g larger and t equal others it is clip((k - g) / (t + 1), 0, 1).
    """
    own = np.diagonal(cosines)[:, None]
    larger = (cosines > own).sum(axis=1)
    equal = (cosines == own).sum(axis=1) - 1
    chance: NDArray[np.float64] = np.clip((k - larger) / (equal + 1), 0.0, 1.0)
    return chance


def _shifts(store: FeatureStore, slug: str, rows: NDArray[np.int64]) -> dict[int, float]:
    image, text = store.image(slug), store.text(slug)
    means = {}
    for shift in SHIFTS:
        inside = rows[(rows + shift >= 0) & (rows + shift < len(store))]
        own, other = image[inside], text[inside + shift]
        sound = truly_sound(own) & truly_sound(other)
        if sound.any():
            means[shift] = float(np.einsum("nd,nd->n", unit(own[sound]), unit(other[sound])).mean())
    return means
