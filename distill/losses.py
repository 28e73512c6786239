"""The losses, as pure functions of features.

Shapes: B batch, D student width, E teacher width, T teachers. Features come as the towers give them
and are normalised here, in float32. `groups_B` numbers captions: equal captions are positives of each other,
so that a corpus with repeated captions does not punish a right answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of unit norm in float32."""
    return F.normalize(features.float(), dim=-1)


def contrast(
    queries_BD: torch.Tensor, keys_BD: torch.Tensor, scale: torch.Tensor, groups_B: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of each query against all keys: CLIP's loss in one direction (arXiv 2103.00020, figure 3).

    With q, k of unit norm, s the scale and P(i) the keys in the group of i:
    ``mean_i [ -1/|P(i)| * sum_{j in P(i)} log softmax_j(s * q_i . k_j) ]``. Without repeated groups this is
    the ordinary InfoNCE.
    """
    log_p_BB = (scale * queries_BD @ keys_BD.T).log_softmax(dim=-1)
    positive_BB = groups_B[:, None] == groups_B[None, :]
    return -(log_p_BB * positive_BB).sum(-1).div(positive_BB.sum(-1)).mean()


def task_loss(
    image_BD: torch.Tensor, text_BD: torch.Tensor, scale: torch.Tensor, groups_B: torch.Tensor
) -> torch.Tensor:
    """Symmetric CLIP loss of the student with itself; `scale` is exp of the learned temperature."""
    image_BD, text_BD = unit(image_BD), unit(text_BD)
    return (contrast(image_BD, text_BD, scale, groups_B) + contrast(text_BD, image_BD, scale, groups_B)) / 2


def feature_loss(student_BE: torch.Tensor, teacher_BE: torch.Tensor) -> torch.Tensor:
    """``mean_i (1 - cos(s_i, t_i))``: half the squared distance of unit vectors (FD of CLIP-KD, arXiv 2307.12732,
    up to the factor 2/E of a mean over elements, which would make the weight depend on the width)."""
    return (1 - (unit(student_BE) * unit(teacher_BE)).sum(-1)).mean()


def cross_loss(
    student_image_BE: torch.Tensor,
    student_text_BE: torch.Tensor,
    teacher_image_BE: torch.Tensor,
    teacher_text_BE: torch.Tensor,
    scale: torch.Tensor,
    groups_B: torch.Tensor,
) -> torch.Tensor:
    """Interactive contrast (ICL of CLIP-KD): student images against teacher texts and the reverse, halved."""
    to_text = contrast(unit(student_image_BE), unit(teacher_text_BE), scale, groups_B)
    to_image = contrast(unit(student_text_BE), unit(teacher_image_BE), scale, groups_B)
    return (to_text + to_image) / 2
