"""Do a teacher's captions fit their images: cosines, retrieval, by modality, and whether captions slipped by a row."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkd.base.arrays import Bools, Floats, Ints, Singles
from mmkd.store.array import FeatureArray
from mmkd.store.inspect.sampling import Distribution, distribution, truly_sound, unit
from mmkd.store.layout import PAIR_SOUND, TOWERS
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import value_codes

POOL_ROWS = 1000
RANKS = {f"{way}@{k}": k for way in ("i2t", "t2i") for k in (1, 10)}
UNMATCHED = 4
"""Other captions of its pool that an image is compared with."""
SHIFTS = (-2, -1, 0, 1, 2)

NOT_STATED, OTHERS = "not stated", "all others"
MOST = 12
"""Modalities listed; rarer ones are counted as `OTHERS`."""


@dataclass(frozen=True)
class Modalities:
    """Modality of each row that the sample table states: CT, MRI, histology, ..."""

    names: tuple[str, ...]
    """Most frequent first, then `OTHERS` where there are more than `MOST`."""
    codes: NDArray[np.uint8]
    """(N,) a place in `names` for every row of the store."""


def modalities(columns: Iterable[pa.ChunkedArray]) -> Modalities:
    """Group rows by their entry in the column `modality` (strings; null or blank where none is stated), which comes in
    pieces."""
    blanks = ((pc.fill_null(pc.equal(pc.utf8_trim_whitespace(one), ""), True), one) for one in columns)
    every, indices = value_codes(pc.if_else(blank, NOT_STATED, column) for blank, column in blanks)
    counts = np.bincount(indices, minlength=len(every))
    order = sorted(range(len(every)), key=lambda i: (-counts[i], every[i]))
    kept = [i for i in order if every[i] != OTHERS][:MOST]
    place = np.full(max(len(every), 1), len(kept), dtype=np.uint8)
    place[kept] = np.arange(len(kept), dtype=np.uint8)
    names = [every[i] for i in kept] + ([OTHERS] if len(order) > len(kept) else [])
    return Modalities(tuple(names), place[indices])


@dataclass(frozen=True)
class ModalityPairs:
    """Pairs of one modality, in the same pools as all others: medians of cosines, recall as in `PairStatistics`."""

    modality: str
    pairs: int
    matched: float
    unmatched: float
    recall: dict[str, float]


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
        """The s whose mean cosine is the largest by five standard errors of a mean of unmatched cosines, which chance
        does not reach; 0 when none is."""
        best = max(self.shift, key=lambda s: self.shift[s], default=0)
        # 1.349 standard deviations lie between the quartiles of a normal distribution.
        error = (self.unmatched.q75 - self.unmatched.q25) / 1.349 / math.sqrt(max(min(self.pairs, POOL_ROWS), 1))
        return best if best and self.shift[best] > self.shift.get(0, -2.0) + 5 * error else 0


def pair_statistics(store: FeatureStore, slug: str, rows: Ints, seed: int, modalities: Modalities) -> PairStatistics:
    """Compare images and captions of one teacher on those of `rows`, int64 (n,) ascending, where it has both, in
    disjoint pools of 1000 shuffled by `seed`. Raises UserError for an unknown teacher."""
    image, text = store.image(slug), store.text(slug)
    rows = rows[store.valid(slug)[rows] == PAIR_SOUND]
    shuffled = np.random.default_rng(seed).permutation(rows)
    pool = min(POOL_ROWS, len(rows))
    pools = len(rows) // pool if pool else 0
    scored, codes = [_scores(np.empty((0, 0), np.float32))], [np.empty(0, np.uint8)]
    for taken in shuffled[: pools * pool].reshape(pools, pool):
        sound = taken[truly_sound(image[taken]) & truly_sound(text[taken])]
        scored.append(_scores(unit(image[sound]) @ unit(text[sound]).T))
        codes.append(modalities.codes[sound])
    scores, code = np.concatenate(scored, axis=1), np.concatenate(codes)
    matched, unmatched, hits = scores[0], scores[1 : 1 + UNMATCHED], scores[1 + UNMATCHED :]

    def recall(chosen: Bools) -> dict[str, float]:
        known = {name for name, k in RANKS.items() if pool > k and chosen.any()}
        return {
            name: float(hit[chosen].mean(dtype=np.float64)) if name in known else math.nan
            for name, hit in zip(RANKS, hits, strict=True)
        }

    return PairStatistics(
        slug=slug,
        pairs=len(rows),
        matched=distribution(matched, (-1.0, 1.0)),
        unmatched=distribution(unmatched.ravel(), (-1.0, 1.0)),
        pool=pool,
        pools=pools,
        recall=recall(np.ones(len(code), dtype=bool)),
        chance={name: k / pool if pool > k else math.nan for name, k in RANKS.items()},
        shift=_shifts(image, text, rows[:POOL_ROWS]),
        modalities=tuple(
            ModalityPairs(
                modality=modalities.names[each],
                pairs=int(np.count_nonzero(own)),
                matched=float(np.median(matched[own])),
                unmatched=distribution(unmatched[:, own].ravel()).median,
                recall=recall(own),
            )
            for each in np.unique(code)
            for own in [code == each]
        ),
    )


def _scores(cosines: Singles) -> Singles:
    """Return for the n images of a pool the cosine with their own caption, with `UNMATCHED` others (NaN where the pool
    has fewer) and the chance of a hit by `RANKS`, one row each. `cosines` (n, n): images with captions."""
    scores = np.full((1 + UNMATCHED + len(RANKS), len(cosines)), np.nan, dtype=np.float32)
    for offset in range(min(1 + UNMATCHED, len(cosines))):
        scores[offset] = np.diagonal(np.roll(cosines, -offset, axis=1))
    for place, (name, k) in enumerate(RANKS.items(), 1 + UNMATCHED):
        scores[place] = hit_chance(cosines if name.startswith("i2t") else cosines.T, k)
    return scores


def modality_names(pairs: Sequence[PairStatistics]) -> list[str]:
    """Return modalities that any teacher has pairs of, most frequent first; none if there is only one."""
    counts: Counter[str] = Counter()
    for pair in pairs:
        counts.update({each.modality: each.pairs for each in pair.modalities})
    return [name for name, _ in counts.most_common()] if len(counts) > 1 else []


def sound_pairs(
    store: FeatureStore, slug: str, rows: Ints
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]], Bools]:
    """Return image and caption features (n, D) of `rows`, and which of them, bool (n,), are sound on both sides."""
    image, text = store.image(slug)[rows], store.text(slug)[rows]
    return image, text, (store.valid(slug)[rows] == PAIR_SOUND) & truly_sound(image) & truly_sound(text)


def pair_cosines(store: FeatureStore, slugs: Sequence[str], rows: Ints) -> Singles:
    """Return cosines (teachers, n) of the images of `rows` with their captions; NaN where a teacher lacks one."""
    found = np.full((len(slugs), len(rows)), np.nan, dtype=np.float32)
    for i, slug in ((i, slug) for i, slug in enumerate(slugs) if store.card(slug).towers == TOWERS):
        image, text, sound = sound_pairs(store, slug, rows)
        found[i, sound] = np.einsum("nd,nd->n", unit(image[sound]), unit(text[sound]))
    return found


def hit_chance(cosines: Singles, k: int) -> Floats:
    """Return for each row of a square table the chance that its diagonal entry is among the k largest, ties broken at
    random, so that the order of rows does not matter: with g larger and t equal others, clip((k - g) / (t + 1), 0,
    1)."""
    own = np.diagonal(cosines)[:, None]
    larger = (cosines > own).sum(axis=1)
    equal = (cosines == own).sum(axis=1) - 1
    return np.asarray(np.clip((k - larger) / (equal + 1), 0.0, 1.0))


def _shifts(image: FeatureArray, text: FeatureArray, rows: Ints) -> dict[int, float]:
    means = {}
    for shift in SHIFTS:
        inside = rows[(rows + shift >= 0) & (rows + shift < len(text))]
        own, other = image[inside], text[inside + shift]
        sound = truly_sound(own) & truly_sound(other)
        if sound.any():
            means[shift] = float(np.einsum("nd,nd->n", unit(own[sound]), unit(other[sound])).mean())
    return means
