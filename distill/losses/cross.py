"""Interactive contrast: the student's image against the teacher's texts, and the reverse."""

from __future__ import annotations

import torch

from mmkd.distill.losses.contrast import both_ways
from mmkd.distill.losses.pair_features import PairFeatures


def cross_loss(student: PairFeatures, teacher: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """ICL of CLIP-KD (arXiv 2307.12732), float (..., Q).

    ``1/2 [ contrast(s_img, T_txt) + contrast(s_txt, T_img) ]``.
    student: this rank's rows in the teacher's space. teacher: the teacher's rows of the whole batch.
    """
    return both_ways(student, teacher, scale)
