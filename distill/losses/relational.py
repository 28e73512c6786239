"""Relational distillation: the student's similarity matrix follows the teacher's. No head, any width."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkd.distill.losses.pair_features import PairFeatures


@dataclass(frozen=True)
class Similarities:
    """One side of the comparison: rows of this rank, rows of all ranks, and the scale of their softmax."""

    rows: PairFeatures
    keys: PairFeatures
    scale: torch.Tensor

    def log_softmax(self, available_K: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Image to text and text to image, each (..., Q, K), over the available keys."""
        to_text = self.scale * self.rows.image @ self.keys.text.mT
        to_image = self.scale * self.rows.text @ self.keys.image.mT
        if available_K is not None:
            lowest = torch.finfo(to_text.dtype).min
            missing_1K = ~available_K[..., None, :]
            to_text, to_image = (logits.masked_fill(missing_1K, lowest) for logits in (to_text, to_image))
        return to_text.log_softmax(-1), to_image.log_softmax(-1)


def relational_loss(student: Similarities, teacher: Similarities) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's similarities from the teacher's, both directions, float (..., Q).

    ``p_ij = softmax_j(a t_img_i . t_txt_j)``, ``q_ij = softmax_j(b s_img_i . s_txt_j)``,
    ``v_i = sum_j p_ij log(p_ij / q_ij)``,
    averaged with the same of texts against images: CRD of CLIP-KD (arXiv 2307.12732), affinity mimicking
    of TinyCLIP (arXiv 2309.12314) up to the teacher's entropy, a constant. Keys that the teacher lacks are left
    out of both softmaxes.
    """
    available_K = teacher.keys.available
    log_p = teacher.log_softmax(available_K)
    log_q = student.log_softmax(available_K)
    ways = [(p.exp() * (p - q)).sum(-1) for p, q in zip(log_p, log_q, strict=True)]
    return (ways[0] + ways[1]) / 2
