"""Feature distillation: how far the student's row lies from the teacher's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from mmkd.distill.losses.pair_features import PairFeatures

FeatureKind = Literal["cosine", "mse", "smooth_l1"]
FEATURE_KINDS: tuple[FeatureKind, ...] = get_args(FeatureKind)


def feature_loss(student: PairFeatures, teacher: PairFeatures, kind: FeatureKind) -> torch.Tensor:
    """``d(s_img, t_img) + d(s_txt, t_txt)``, float (..., Q), with d one of

    - cosine: ``1 - s . t`` of unit rows, half their squared distance, whatever the width E;
    - mse: ``1/E sum_e (s_e - t_e)^2`` (FD of CLIP-KD, arXiv 2307.12732); of unit rows it is 2/E of the
      above, so its weight has to grow with the width;
    - smooth_l1: ``1/E sum_e h(sqrt(E) (s_e - t_e))`` with ``h(x) = x^2/2`` up to 1 and ``|x| - 1/2`` beyond: Huber's
      loss of rows whose entries have unit mean square, as UNIC applies it to standardised features (arXiv 2408.05088).
    """
    return _distance(student.image, teacher.image, kind) + _distance(student.text, teacher.text, kind)


def _distance(student_QE: torch.Tensor, teacher_QE: torch.Tensor, kind: FeatureKind) -> torch.Tensor:
    if kind == "cosine":
        return 1 - (student_QE * teacher_QE).sum(-1)
    if kind == "mse":
        return (student_QE - teacher_QE).square().mean(-1)
    root = student_QE.shape[-1] ** 0.5
    return F.smooth_l1_loss(root * student_QE, root * teacher_QE, reduction="none").mean(-1)
