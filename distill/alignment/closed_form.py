"""Alignments in closed form, from the means and covariances of all teachers: PCA, whitening, Procrustes.

PCA makes widths equal, not spaces: a baseline. PHI-S (Ranzinger et al. 2024, arXiv 2410.01680) rotates to the principal
directions, then by a normalized Hadamard matrix, and divides by the root of the mean variance. All entries of such a
matrix have the same size, so every channel gets the mean of the variances: errors in that space are errors in the
teacher's. Orthogonal Procrustes (Schönemann 1966): of all matrices W with orthonormal rows (or columns)
``sum |z - W x|^2`` is least for ``W = U V'``, where ``U S V'`` is the singular value decomposition of ``sum z x'``; the
factor that goes with it is ``tr S / sum |x|^2``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmkd.base.errors import ConfigError, UserError
from mmkd.distill.alignment import TeacherMap
from mmkd.distill.alignment.config import Center, PCASettings, ProcrustesSettings, WhiteningSettings
from mmkd.distill.alignment.rows import BLOCK, AlignmentRows
from mmkd.store.layout import TOWERS, Tower


@dataclass(frozen=True)
class Moments:
    """Means and covariance of one teacher's features, over images and texts of its pairs. means: tower to float64 (E,),
    subtracted before the map. covariance: float64 (E, E) about them, of both towers."""

    means: dict[Tower, torch.Tensor]
    covariance: torch.Tensor

    def main_directions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest variances (count,), descending, and their unit directions (count, E); zeros beyond E."""
        values, vectors = torch.linalg.eigh(self.covariance)
        values, vectors = values.flip(0).clamp(min=0)[:count], vectors.flip(1).T[:count]
        # An eigenvector's sign is arbitrary: its largest entry is made positive, so that files are equal.
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        vectors = vectors * largest.sign()
        lacking = count - len(values)
        return F.pad(values, (0, lacking)), F.pad(vectors, (0, 0, 0, lacking))

    def map_of(self, weight: torch.Tensor) -> TeacherMap:
        """Return the map that subtracts the means and multiplies by `weight`, float64 (D, E)."""
        image, text = ((-weight @ self.means[tower]).float() for tower in TOWERS)
        return TeacherMap(weight.float(), image, text)


def moments(rows: AlignmentRows, center: Center) -> dict[str, Moments]:
    """Compute the moments of every teacher in one pass over the rows, in float64."""
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
        means = {"tower": own, "shared": dict.fromkeys(TOWERS, shared), "none": dict.fromkeys(TOWERS, zero)}[center]
        # Sum of (x - m)(x - m)' over a tower, where m is not always the tower's own mean.
        outer = sum(
            torch.outer(means[tower], means[tower])
            - torch.outer(own[tower], means[tower])
            - torch.outer(means[tower], own[tower])
            for tower in TOWERS
        )
        out[slug] = Moments(means, squares[slug] / (2 * count) + outer / 2)
    return out


def fit_pca(rows: AlignmentRows, settings: PCASettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """``y = V' (x - m)`` with the `dim` main directions V; zeros are appended where a teacher is narrower."""
    found = moments(rows, settings.center)
    return {slug: own.map_of(own.main_directions(dim)[1]) for slug, own in found.items()}


def hadamard(order: int) -> torch.Tensor:
    """Build a matrix of +1 and -1 with orthogonal rows, float64 (order, order): Sylvester's doubling of 1, 12 or 20,
    the latter by Paley's first construction (Paley 1933): ``I + S`` of order q + 1, S the skew matrix of quadratic
    residues modulo q. Raises ConfigError if there is none of this order."""
    start = {1: 1, 3: 12, 5: 20}.get(order // (order & -order), 0)
    if not start or order % start:
        raise ConfigError(
            f"PHI-S needs a Hadamard matrix, and none of order {order} is known here; use a dim of 2^n, 12 * 2^n "
            "or 20 * 2^n (256, 384, 512, 640, 768, 1024), or `kind: full`"
        )
    matrix = torch.eye(start, dtype=torch.float64)
    if start > 1:
        q = start - 1
        squares = {i * i % q for i in range(1, q)}
        residue = [0 if i == 0 else 1 if i in squares else -1 for i in range(q)]
        core = torch.tensor([[residue[(i - j) % q] for j in range(q)] for i in range(q)])
        matrix[0, 1:], matrix[1:, 0] = 1, -1
        matrix[1:, 1:] += core
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def fit_whitening(rows: AlignmentRows, settings: WhiteningSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """``y = H V' (x - m) / sqrt(mean variance)`` for PHI-S, ``y = diag(variance)^-1/2 V' (x - m)`` for `full`. Raises
    ConfigError if there is no Hadamard matrix of order `dim`."""
    rotation = hadamard(dim) / dim**0.5 if settings.kind == "phi_s" else torch.eye(dim, dtype=torch.float64)
    out = {}
    for slug, own in moments(rows, settings.center).items():
        variances, directions = own.main_directions(dim)
        if settings.kind == "phi_s":
            weight = rotation @ directions / variances.mean().sqrt()
        else:
            weight = directions / variances.clamp(min=settings.floor * float(variances[0])).sqrt()[:, None]
        out[slug] = own.map_of(weight)
    return out


def fit_procrustes(rows: AlignmentRows, settings: ProcrustesSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """Return the reference in its `dim` main directions, the others rotated (and scaled) onto it over the rows they
    share. Raises ConfigError if it is not one of the teachers; UserError if one shares no row with it."""
    reference = settings.reference or max(rows.slugs, key=rows.pairs.__getitem__)
    if reference not in rows.slugs:
        raise ConfigError(f"procrustes.reference is {reference!r}, the teachers are {', '.join(rows.slugs)}")
    found = moments(rows, settings.center)
    target = found[reference].main_directions(dim)[1]
    others = [slug for slug in rows.slugs if slug != reference]
    cross = {slug: torch.zeros(dim, rows.widths[slug], dtype=torch.float64) for slug in others}
    power = dict.fromkeys(others, 0.0)
    for block in rows.blocks():
        known = block[reference]
        place = torch.full((BLOCK,), -1)
        place[known.members] = torch.arange(len(known.members))
        for slug in others:
            mine = place[block[slug].members]
            for tower in TOWERS:
                z = (known.tower(tower)[mine[mine >= 0]].double() - found[reference].means[tower]) @ target.T
                x = block[slug].tower(tower)[mine >= 0].double() - found[slug].means[tower]
                cross[slug] += z.T @ x
                power[slug] += float(x.square().sum())
    maps = {reference: found[reference].map_of(target)}
    for slug in others:
        if not power[slug]:
            raise UserError(f"teacher {slug} shares no row with {reference}; choose another procrustes.reference")
        left, sizes, right = torch.linalg.svd(cross[slug], full_matrices=False)
        factor = float(sizes.sum()) / power[slug] if settings.scale else 1.0
        maps[slug] = found[slug].map_of(factor * left @ right)
    return maps
