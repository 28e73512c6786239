"""Comparable pairs of a survival cohort, counted one by one: what the concordance index is checked against."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np


@dataclass(frozen=True)
class PairCounts:
    """Comparable pairs by outcome."""

    concordant: int
    discordant: int
    tied_risk: int

    @property
    def index(self) -> float:
        """The concordance index; NaN where no pair can be compared."""
        pairs = self.concordant + self.discordant + self.tied_risk
        return (self.concordant + self.tied_risk / 2) / pairs if pairs else float("nan")


def count_pairs(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> PairCounts:
    """Count pairs of which one subject is known to have died first."""
    outcomes = [0, 0, 0]
    subjects = list(zip(np.asarray(risk).tolist(), np.asarray(time).tolist(), np.asarray(event).tolist(), strict=True))
    for (one, died, seen), (other, later, too) in permutations(subjects, 2):
        if seen and (died < later or (died == later and not too)):
            outcomes[0 if one > other else 1 if one < other else 2] += 1
    return PairCounts(*outcomes)
