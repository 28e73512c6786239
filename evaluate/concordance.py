"""Harrell's concordance index, for the data themselves and for a whole block of bootstrap resamples.

Two subjects can be compared when the one with the shorter time had the event (or both have the same time and one of
them was censored: the other died first). A pair is concordant when the one who died first had the higher risk; equal
risks count half. Harrell et al. 1996, Statistics in Medicine 15:361, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.metrics import Floats

ROWS = 512
"""Subjects compared with all others at a time: n x 512 pairs are held."""


@dataclass(frozen=True)
class PairCounts:
    """Comparable pairs of a cohort by outcome."""

    concordant: int
    discordant: int
    tied_risk: int

    @property
    def index(self) -> float:
        """The concordance index; NaN where no pair can be compared."""
        pairs = self.concordant + self.discordant + self.tied_risk
        return (self.concordant + self.tied_risk / 2) / pairs if pairs else float("nan")


def count_pairs(risk: Floats, time: Floats, event: NDArray[np.bool_]) -> PairCounts:
    """Count the pairs of a cohort; arguments as for `concordance`, all (n,)."""
    comparable, ahead, tied = _pairs(slice(None), risk, time, event)
    return PairCounts(
        concordant=int((comparable & ahead).sum()),
        discordant=int((comparable & ~ahead & ~tied).sum()),
        tied_risk=int((comparable & tied).sum()),
    )


def concordance(risk: Floats, time: Floats, event: NDArray[np.bool_], weights: Floats) -> Floats:
    """Concordance index in each of B weightings; NaN where no pair can be compared.

    Counts instead of repeated subjects keep a subject from being compared with itself, which would add ties of risk
    that are not in the data. Only the order of the risks counts, however close they are.

    Args:
        risk: float64 (n,), higher means an earlier event.
        time: float64 (n,), of the event or of the last contact.
        event: bool (n,), whether the event was seen.
        weights: float64 (B, n).

    Returns:
        float64 (B,).
    """
    right, every = np.zeros(len(weights)), np.zeros(len(weights))
    for start in range(0, len(risk), ROWS):
        part = slice(start, start + ROWS)
        comparable, ahead, tied = _pairs(part, risk, time, event)
        points = comparable * (ahead + 0.5 * tied)
        own = weights[:, part]
        right += np.einsum("bi,bi->b", own, weights @ points.T)
        every += np.einsum("bi,bi->b", own, weights @ comparable.T.astype(np.float64))
    result = np.full(len(weights), np.nan)
    np.divide(right, every, out=result, where=every > 0)
    return result


def _pairs(
    part: slice, risk: Floats, time: Floats, event: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """For subjects of `part` (rows) and all others: comparable with the row dying first; row's risk higher; equal."""
    first = event[part, None] & ((time[part, None] < time) | ((time[part, None] == time) & ~event))
    return first, risk[part, None] > risk, risk[part, None] == risk
