"""PCA: each teacher's main directions, in order of variance. A baseline: it makes widths equal, not spaces."""

from __future__ import annotations

from mmkd.distill.alignment.config import PCASettings
from mmkd.distill.alignment.maps import TeacherMap
from mmkd.distill.alignment.moments import moments
from mmkd.distill.alignment.rows import AlignmentRows


def fit_pca(rows: AlignmentRows, settings: PCASettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """``y = V' (x - m)`` with the `dim` main directions V; zeros are appended where a teacher is narrower."""
    found = moments(rows, settings.centre)
    return {slug: own.map_of(own.main_directions(dim)[1]) for slug, own in found.items()}
