"""Do a teacher's captions fit their images: cosines, retrieval, and whether the captions slipped by a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmkd.store.inspect.distribution import Distribution, distribution
from mmkd.store.inspect.modalities import Modalities
from mmkd.store.inspect.sampling import truly_sound, unit
from mmkd.store.layout import PAIR_SOUND

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

POOL_ROWS = 1000
RANKS = (1, 10)
SHIFTS = (-2, -1, 0, 1, 2)
_RECALLS = tuple(f"{way}@{k}" for way in ("i2t", "t2i") for k in RANKS)


@dataclass(frozen=True)
class ModalityPairs:
    """The pairs of one modality, in the same pools as those of all others."""

    modality: str
    pairs: int
    """In the pools."""
    matched: float
    """Median cosine of an image with its own caption."""
    unmatched: float
    """Median cosine of an image with the captions of some other rows of its pool, of any modality."""
    recall: dict[str, float]
    """As `PairStatistics.recall`: how often the counterpart of a row of this modality is found among all rows."""


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
    """Value of random features, k / pool."""
    shift: dict[int, float]
    """Mean cosine of the image in row r with the caption in row r + s, by s. Largest at 0 when rows fit."""
    modalities: tuple[ModalityPairs, ...]
    """The same by modality, most frequent first; those without a pair in the pools are left out."""

    @property
    def best_shift(self) -> int:
        """The s whose mean cosine is clearly the largest; 0 when none beats the rows' own captions. Clearly: by five
        standard errors of a mean of unmatched cosines, which chance does not reach."""
        best = max(self.shift, key=lambda s: self.shift[s], default=0)
        # 1.349 standard deviations lie between the quartiles of a normal distribution.
        error = (self.unmatched.q75 - self.unmatched.q25) / 1.349 / math.sqrt(max(min(self.pairs, POOL_ROWS), 1))
        return best if best and self.shift[best] > self.shift.get(0, -2.0) + 5 * error else 0


def pair_statistics(
    store: FeatureStore, slug: str, rows: NDArray[np.int64], seed: int, modalities: Modalities
) -> PairStatistics:
    """Compare images and captions of one teacher. Raises UserError if there is no such teacher.

    Args:
        store: the store.
        slug: teacher.
        rows: int64 (n,) ascending; those without a sound pair are left out.
        seed: shuffles rows into disjoint pools of 1000; rows left over join no pool.
        modalities: of every row of the store.
    """
    image, text = store.image(slug), store.text(slug)
    rows = rows[store.valid(slug)[rows] == PAIR_SOUND]
    shuffled = np.random.default_rng(seed).permutation(rows)
    pool = min(POOL_ROWS, len(rows))
    pools = len(rows) // pool if pool else 0
    scores = _Scores(len(modalities.names))
    for index in range(pools):
        taken = shuffled[index * pool : (index + 1) * pool]
        sound = truly_sound(image[taken]) & truly_sound(text[taken])
        cosines = unit(image[taken[sound]]) @ unit(text[taken[sound]]).T
        scores.add(cosines, modalities.codes[taken[sound]])
    return PairStatistics(
        slug=slug,
        pairs=len(rows),
        matched=distribution(np.concatenate(scores.matched), (-1.0, 1.0)),
        unmatched=distribution(np.concatenate(scores.unmatched), (-1.0, 1.0)),
        pool=pool,
        pools=pools,
        recall=scores.recall(slice(None), pool),
        chance={name: _rank_of(name) / pool if pool > _rank_of(name) else math.nan for name in _RECALLS},
        shift=_shifts(store, slug, rows[:POOL_ROWS]),
        modalities=tuple(scores.by_modality(modalities.names, pool)),
    )


class _Scores:
    """Cosines and hits of one pool after another, by modality."""

    def __init__(self, groups: int) -> None:
        self.matched, self.unmatched = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        self.codes, self.codes_of_unmatched = [np.empty(0, np.uint8)], [np.empty(0, np.uint8)]
        self.hits = {name: np.zeros(groups) for name in _RECALLS}
        self.scored = np.zeros(groups, dtype=np.int64)

    def add(self, cosines: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
        """Take in a pool: cosines (n, n) of images with captions, and the modality (n,) of its rows."""
        groups = len(self.scored)
        self.scored += np.bincount(codes, minlength=groups)
        self.matched.append(np.diagonal(cosines))
        self.codes.append(codes)
        for offset in range(1, min(5, len(cosines))):
            self.unmatched.append(np.diagonal(np.roll(cosines, -offset, axis=1)))
            self.codes_of_unmatched.append(codes)
        for way, table in (("i2t", cosines), ("t2i", cosines.T)):
            for k in RANKS:
                self.hits[f"{way}@{k}"] += np.bincount(codes, hit_chance(table, k), groups)

    def recall(self, groups: int | slice, pool: int) -> dict[str, float]:
        """Return the share of hits among the rows of one modality, or of all."""
        scored = int(self.scored[groups].sum())
        return {
            name: float(hits[groups].sum()) / scored if scored and pool > _rank_of(name) else math.nan
            for name, hits in self.hits.items()
        }

    def by_modality(self, names: tuple[str, ...], pool: int) -> Iterator[ModalityPairs]:
        """Yield one value for each modality that has pairs."""
        matched, unmatched = np.concatenate(self.matched), np.concatenate(self.unmatched)
        codes, others = np.concatenate(self.codes), np.concatenate(self.codes_of_unmatched)
        for code in np.flatnonzero(self.scored).tolist():
            away = unmatched[others == code]
            yield ModalityPairs(
                modality=names[code],
                pairs=int(self.scored[code]),
                matched=float(np.median(matched[codes == code])),
                unmatched=float(np.median(away)) if len(away) else math.nan,
                recall=self.recall(code, pool),
            )


def modality_names(pairs: Sequence[PairStatistics]) -> list[str]:
    """Return modalities that any teacher has pairs of, most frequent first; none if there is only one."""
    counts: Counter[str] = Counter()
    for pair in pairs:
        counts.update({each.modality: each.pairs for each in pair.modalities})
    return [name for name, _ in counts.most_common()] if len(counts) > 1 else []


def sound_pairs(
    store: FeatureStore, slug: str, rows: NDArray[np.int64]
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]], NDArray[np.bool_]]:
    """Image and caption features (n, D) of `rows`, and which of them, bool (n,), are sound on both sides. Raises
    UserError if there is no such teacher."""
    image, text = store.image(slug)[rows], store.text(slug)[rows]
    return image, text, (store.valid(slug)[rows] == PAIR_SOUND) & truly_sound(image) & truly_sound(text)


def pair_cosines(store: FeatureStore, slugs: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return cosines (teachers, n) of the images of `rows` with their own captions; NaN where a teacher lacks one of
    both. Raises UserError if there is no such teacher."""
    found = np.full((len(slugs), len(rows)), np.nan, dtype=np.float32)
    for i, slug in enumerate(slugs):
        image, text, sound = sound_pairs(store, slug, rows)
        found[i, sound] = np.einsum("nd,nd->n", unit(image[sound]), unit(text[sound]))
    return found


def _rank_of(name: str) -> int:
    return int(name.partition("@")[2])


def hit_chance(cosines: NDArray[np.float32], k: int) -> NDArray[np.float64]:
    """For each row of a square table, how likely its diagonal entry is among the k largest, ties broken by lot. Equal
    captions give equal cosines: counting them for or against the row would make the figure depend on chance or on the
    order of rows. With g larger and t equal others it is clip((k - g) / (t + 1), 0, 1)."""
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
