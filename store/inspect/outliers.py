"""Sampled rows that teachers find odd: a caption that does not fit its image, a feature of unusual length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmkd.base.arrays import Floats, Ints
from mmkd.store.inspect.pairs import sound_pairs
from mmkd.store.inspect.sampling import unit
from mmkd.store.layout import TOWERS
from mmkd.store.reader import FeatureStore

MIN_ROWS = 20

Kind = Literal["caption fits least", "image norm", "caption norm"]


@dataclass(frozen=True)
class Outlier:
    """One odd row; `cosine`: mean of image and caption over the `teachers` that have the row."""

    row: int
    kind: Kind
    """`caption fits least`: last in an order, which need not be wrong; see `score`."""
    score: float
    """Mean over teachers of standard scores: (value - median) / (1.4826 x median absolute deviation)."""
    cosine: float
    teachers: int


def outliers(store: FeatureStore, slugs: Sequence[str], rows: Ints, each: int = 8) -> tuple[Outlier, ...]:
    """Return of the sample `rows`, int64 (n,) ascending, the first `each` of each kind by robust scores averaged over
    teachers; of norms, compared by their logarithm, only scores beyond 4. Raises UserError for an unknown teacher."""
    scores: dict[Kind, Floats] = {
        kind: np.full((len(slugs), len(rows)), np.nan) for kind in ("caption fits least", "image norm", "caption norm")
    }
    cosines = np.full((len(slugs), len(rows)), np.nan)
    for i, slug in ((i, slug) for i, slug in enumerate(slugs) if store.card(slug).towers == TOWERS):
        image, text, sound = sound_pairs(store, slug, rows)
        if np.count_nonzero(sound) < MIN_ROWS:
            continue
        cosines[i, sound] = np.einsum("nd,nd->n", unit(image[sound]), unit(text[sound]))
        lengths = (np.log(np.linalg.norm(values[sound].astype(np.float64), axis=1)) for values in (image, text))
        for values, score in zip((cosines[i, sound], *lengths), scores.values(), strict=True):
            score[i, sound] = standard_scores(values)
    there, fit = np.isfinite(cosines).sum(axis=0), _mean(cosines)
    picked = []
    for kind, by_teacher in scores.items():
        mean = _mean(by_teacher)
        by_fit = kind == "caption fits least"
        odd = mean < 0 if by_fit else np.abs(mean) > 4
        order = np.argsort(mean if by_fit else -np.nan_to_num(np.abs(mean)), kind="stable")[:each]
        order = order[odd[order]].tolist()
        picked += [Outlier(int(rows[i]), kind, float(mean[i]), float(fit[i]), int(there[i])) for i in order]
    return tuple(picked)


def standard_scores(values: Floats) -> Floats:
    """Return distances from the median in units of 1.4826 times the median absolute deviation (robust z-scores)."""
    middle = np.median(values)
    # Unit norms differ by rounding alone: a spread below a thousandth is none.
    spread = max(1.4826 * float(np.median(np.abs(values - middle))), 1e-3)
    return np.asarray((values - middle) / spread, dtype=np.float64)


def _mean(values: Floats) -> Floats:
    """Return means (n,) over teachers (T, n) that are not NaN; NaN where all are."""
    count = np.isfinite(values).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
