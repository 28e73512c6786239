"""Means and covariances of all teachers in one pass over the rows, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkd.distill.alignment.config import Centre
from mmkd.distill.alignment.maps import TeacherMap
from mmkd.distill.alignment.rows import AlignmentRows
from mmkd.store.layout import TOWERS, Tower


@dataclass(frozen=True)
class Moments:
    """One teacher's, over images and texts of its pairs.

    means: tower to float64 (E,), what is subtracted. covariance: float64 (E, E), about those means, of both towers.
    """

    means: dict[Tower, torch.Tensor]
    covariance: torch.Tensor

    def main_directions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Variances (count,) descending and unit directions (count, E) of the largest; zeros where E is smaller."""
        values, vectors = torch.linalg.eigh(self.covariance)
        values, vectors = values.flip(0).clamp(min=0)[:count], vectors.flip(1).T[:count]
        # The sign of an eigenvector is anyone's choice: the largest entry is made positive, so that files are equal.
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        vectors = vectors * largest.sign()
        lacking = count - len(values)
        if lacking > 0:
            values = torch.cat([values, values.new_zeros(lacking)])
            vectors = torch.cat([vectors, vectors.new_zeros(lacking, vectors.shape[1])])
        return values, vectors

    def map_of(self, weight: torch.Tensor) -> TeacherMap:
        """The map that subtracts the means and multiplies by `weight`, float64 (D, E)."""
        image, text = ((-weight @ self.means[tower]).float() for tower in TOWERS)
        return TeacherMap(weight.float(), image, text)


def moments(rows: AlignmentRows, centre: Centre) -> dict[str, Moments]:
    """Of every teacher."""
    counts = dict.fromkeys(rows.slugs, 0)
    sums = {slug: {tower: torch.zeros(rows.widths[slug], dtype=torch.float64) for tower in TOWERS} for slug in counts}
    squares = {slug: torch.zeros(rows.widths[slug], rows.widths[slug], dtype=torch.float64) for slug in counts}
    for block in rows.blocks():
        for slug, part in block.items():
            counts[slug] += len(part.members)
            for tower in TOWERS:
                values = part.tower(tower).double()
                sums[slug][tower] += values.sum(dim=0)
                squares[slug] += values.T @ values
    out = {}
    for slug, count in counts.items():
        own = {tower: total / count for tower, total in sums[slug].items()}
        shared = (own["image"] + own["text"]) / 2
        zero = torch.zeros_like(shared)
        means = {"tower": own, "shared": dict.fromkeys(TOWERS, shared), "none": dict.fromkeys(TOWERS, zero)}[centre]
        # Sum of (x - m)(x - m)' over a tower, with m the mean that is subtracted and not always its own.
        outer = sum(
            torch.outer(means[tower], means[tower])
            - torch.outer(own[tower], means[tower])
            - torch.outer(means[tower], own[tower])
            for tower in TOWERS
        )
        out[slug] = Moments(means, squares[slug] / (2 * count) + outer / 2)
    return out
