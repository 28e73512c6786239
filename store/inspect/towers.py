"""One teacher's image or caption features: are they numbers, do they use their space, do rows repeat."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.arrays import Ints
from mmkd.store.inspect.sampling import BLOCK_ROWS, Distribution, distribution, truly_sound, unit
from mmkd.store.layout import SOUND_BIT, Tower
from mmkd.store.reader import FeatureStore

EXAMPLES = 20
"""Row numbers and groups that a result names; counts are of all."""


@dataclass(frozen=True)
class TowerStatistics:
    """One tower of one teacher over the rows of a sample that the ledger calls sound."""

    slug: str
    tower: Tower
    width: int
    rows: int
    """Sampled rows that the ledger calls sound; every count below is of these."""
    not_finite: int
    zero: int
    broken_rows: tuple[int, ...]
    norms: Distribution
    mean_cosine: float
    """Between different rows: 0 for directions spread evenly, 1 for a collapsed encoder; NaN below two rows."""
    effective_rank: float
    """exp of the entropy of the normalized singular values of the centered unit rows (Roy and Vetterli, EUSIPCO 2007):
    how many directions are in use; at most the width. NaN below two rows."""
    dead_dimensions: tuple[int, ...]
    """Always zero; `constant_dimensions`: always one other value."""
    constant_dimensions: tuple[int, ...]
    repeated_rows: int
    """Rows whose feature is bit for bit that of an earlier one."""
    repeats: tuple[tuple[int, ...], ...]


def tower_statistics(store: FeatureStore, slug: str, tower: Tower, rows: Ints) -> TowerStatistics:
    """Stream those of `rows`, int64 (n,) ascending, that the ledger calls sound. Raises UserError for an unknown
    teacher; CorruptStoreError if a chunk in the ledger is missing or of another size."""
    array = store.features(slug, tower)
    called_sound = rows[(store.valid(slug)[rows] & SOUND_BIT[tower]) != 0]
    sums = _Sums(array.shape[1])
    norms, hashes, broken = [np.empty(0)], [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    not_finite = 0
    for start in range(0, len(called_sound), BLOCK_ROWS):
        block = called_sound[start : start + BLOCK_ROWS]
        values = array[block]
        sound = truly_sound(values)
        not_finite += int(np.count_nonzero(~np.isfinite(values).all(axis=1)))
        broken.append(block[~sound])
        sums.add(values[sound])
        norms.append(np.linalg.norm(values[sound].astype(np.float64), axis=1))
        hashes.append(_row_hashes(values[sound]))
    lost = np.concatenate(broken)
    repeated, groups = _repeats(np.concatenate(hashes), np.setdiff1d(called_sound, lost, assume_unique=True))
    return TowerStatistics(
        slug=slug,
        tower=tower,
        width=array.shape[1],
        rows=len(called_sound),
        not_finite=not_finite,
        zero=len(lost) - not_finite,
        broken_rows=tuple(lost[:EXAMPLES].tolist()),
        norms=distribution(np.concatenate(norms)),
        mean_cosine=sums.mean_cosine(),
        effective_rank=sums.effective_rank(),
        dead_dimensions=sums.still(zero=True),
        constant_dimensions=sums.still(zero=False),
        repeated_rows=repeated,
        repeats=groups,
    )


class _Sums:
    """Moments of unit rows and extremes of raw ones, added up block by block."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = np.zeros(width)
        self.origin = np.zeros(width, dtype=np.float32)
        self.offsets = np.zeros(width)
        self.products = np.zeros((width, width))
        self.low = np.full(width, np.inf)
        self.high = np.full(width, -np.inf)

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Add rows (n, D) that are finite and not zero."""
        if not len(values):
            return
        directions = unit(values)
        if not self.count:
            # Encoders put everything into a narrow cone: measured from its middle, float32 products keep their digits.
            self.origin = directions.mean(axis=0)
        self.count += len(values)
        self.total += directions.sum(axis=0, dtype=np.float64)
        centered = directions - self.origin
        self.offsets += centered.sum(axis=0, dtype=np.float64)
        self.products += centered.T @ centered
        self.low = np.minimum(self.low, values.min(axis=0))
        self.high = np.maximum(self.high, values.max(axis=0))

    def mean_cosine(self) -> float:
        """(|sum of unit rows|^2 - n) / (n (n - 1)): the mean over all pairs, without making them."""
        if self.count < 2:
            return float("nan")
        return float((self.total @ self.total - self.count) / (self.count * (self.count - 1)))

    def effective_rank(self) -> float:
        if self.count < 2:
            return float("nan")
        mean = self.offsets / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        singular = np.sqrt(np.clip(np.linalg.eigvalsh(covariance), 0.0, None))
        # What is below the rounding of float32 products is no direction in use.
        singular = singular[singular > max(1e-3 * float(singular.max()), 1e-6)]
        if not len(singular):
            return 1.0
        share = singular / singular.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    def still(self, zero: bool) -> tuple[int, ...]:
        """Return dimensions that never move, at zero or elsewhere; none below two rows, where nothing could move."""
        if self.count < 2:
            return ()
        return tuple(np.flatnonzero((self.low == self.high) & ((self.low == 0) == zero)).tolist())


def _row_hashes(values: NDArray[np.floating[Any]]) -> NDArray[np.uint64]:
    """Return a 64-bit multilinear hash of each row's bytes; different rows agree once in 1e19 pairs."""
    words = np.ascontiguousarray(values).view(np.uint16).astype(np.uint64)
    odd = 2 * np.random.default_rng(0).integers(0, 1 << 63, words.shape[1], dtype=np.uint64) + 1
    return np.asarray((words * odd).sum(axis=1, dtype=np.uint64))


def _repeats(hashes: NDArray[np.uint64], rows: Ints) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Return how many rows have the hash of an earlier one, and the first groups of such rows."""
    order = np.argsort(hashes, kind="stable")
    _, starts, sizes = np.unique(hashes[order], return_index=True, return_counts=True)
    many = np.flatnonzero(sizes > 1)
    first = many[np.argsort(rows[order[starts[many]]])][:EXAMPLES]
    groups = (rows[order[starts[i] : starts[i] + min(int(sizes[i]), EXAMPLES)]] for i in first)
    return len(rows) - len(sizes), tuple(tuple(group.tolist()) for group in groups)
