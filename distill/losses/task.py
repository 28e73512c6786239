"""CLIP's own loss: the student with itself."""

from __future__ import annotations

import torch

from mmkd.distill.losses.contrast import both_ways
from mmkd.distill.losses.pair_features import PairFeatures


def task_loss(student: PairFeatures, all_students: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy (arXiv 2103.00020, figure 3), float (Q,).

    ``1/2 [ contrast(s_img, S_txt) + contrast(s_txt, S_img) ]``, unit rows; `scale` is exp of the learned temperature.
    student: the rows of this rank. all_students: those of all ranks, the gradient flowing back to each.
    """
    return both_ways(student, all_students, scale)
