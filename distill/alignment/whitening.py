"""Whitening, and PHI-S: every channel of every teacher with the same variance.

PHI-S is Ranzinger et al. 2024, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation"
(arXiv 2410.01680): rotate to the principal directions, then by a normalised Hadamard matrix, and divide by the root of
the mean variance. All entries of such a matrix have the same size, so every channel gets the mean of the variances:
they are balanced by a rotation and one factor, and errors in the balanced space are errors in the teacher's.
"""

from __future__ import annotations

import torch

from mmkd.base.errors import ConfigError
from mmkd.distill.alignment.config import WhiteningSettings
from mmkd.distill.alignment.maps import TeacherMap
from mmkd.distill.alignment.moments import moments
from mmkd.distill.alignment.rows import AlignmentRows

_PALEY = {12: 11, 20: 19}
"""Order to prime q = 3 (mod 4), for Paley's first construction (Paley 1933)."""


def hadamard(order: int) -> torch.Tensor:
    """A matrix of +1 and -1 with orthogonal rows, float64 (order, order): Sylvester's doubling of 1, 12 or 20.

    Raises:
        ConfigError: no such matrix is known here for this order.
    """
    odd = order // (order & -order)
    start = {1: 1, 3: 12, 5: 20}.get(odd, 0)
    if not start or order % start:
        raise ConfigError(
            f"PHI-S needs a Hadamard matrix, there is none here of order {order}; use a dim of 2^n, 12 * 2^n "
            "or 20 * 2^n (256, 384, 512, 640, 768, 1024), or `kind: full`"
        )
    matrix = _paley(_PALEY[start]) if start > 1 else torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _paley(q: int) -> torch.Tensor:
    """Paley's first construction of order q + 1: ``I + S`` with S the skew matrix of quadratic residues."""
    squares = {i * i % q for i in range(1, q)}
    residue = [0 if i == 0 else 1 if i in squares else -1 for i in range(q)]
    core = torch.tensor([[residue[(i - j) % q] for j in range(q)] for i in range(q)], dtype=torch.float64)
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
    return skew + torch.eye(q + 1, dtype=torch.float64)


def fit_whitening(rows: AlignmentRows, settings: WhiteningSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """``y = H V' (x - m) / sqrt(mean variance)`` for PHI-S, ``y = diag(variance)^-1/2 V' (x - m)`` for `full`.

    Raises:
        ConfigError: no Hadamard matrix of order `dim`.
    """
    rotation = hadamard(dim) / dim**0.5 if settings.kind == "phi_s" else torch.eye(dim, dtype=torch.float64)
    out = {}
    for slug, own in moments(rows, settings.centre).items():
        variances, directions = own.main_directions(dim)
        if settings.kind == "phi_s":
            weight = rotation @ directions / variances.mean().sqrt()
        else:
            weight = directions / variances.clamp(min=settings.floor * float(variances[0])).sqrt()[:, None]
        out[slug] = own.map_of(weight)
    return out
