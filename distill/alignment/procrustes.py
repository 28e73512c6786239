"""Orthogonal Procrustes: every teacher rotated onto one of them, so that equal samples come to lie together.

Schönemann 1966: of all matrices W with orthonormal rows (or columns) ``sum |z - W x|^2`` is least for ``W = U V'``,
where ``U S V'`` is the singular value decomposition of ``sum z x'``. The factor that goes with it is
``tr S / sum |x|^2``.
"""

from __future__ import annotations

import torch

from mmkd.base.errors import ConfigError, UserError
from mmkd.distill.alignment.config import ProcrustesSettings
from mmkd.distill.alignment.maps import TeacherMap
from mmkd.distill.alignment.moments import moments
from mmkd.distill.alignment.rows import BLOCK, AlignmentRows
from mmkd.store.layout import TOWERS


def fit_procrustes(rows: AlignmentRows, settings: ProcrustesSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """The reference in its `dim` main directions, the others rotated (and scaled) onto it over the rows they share.

    Raises:
        ConfigError: the reference is not one of the teachers.
        UserError: a teacher shares no row with the reference.
    """
    reference = settings.reference or max(rows.slugs, key=rows.pairs)
    if reference not in rows.slugs:
        raise ConfigError(f"procrustes.reference is {reference!r}, the teachers are {', '.join(rows.slugs)}")
    found = moments(rows, settings.centre)
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
