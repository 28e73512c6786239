"""What is minimised: named terms of a batch, and their weighted sum.

The loop knows nothing of losses and this file knows nothing of loops. Each rank is given its own share of
the batch; the sums over ranks of what it returns are the terms of the whole batch, whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mmkd.distill.batch import Batch, StudentFeatures
from mmkd.distill.config import LossWeights
from mmkd.distill.losses import cross_loss, feature_loss, task_loss
from mmkd.distill.student import INITIAL_LOG_SCALE
from mmkd.distill.world import World

# CLIP clips its temperature at 100 (arXiv 2103.00020, section 2.5).
MAX_LOG_SCALE = math.log(100)


class Objective(nn.Module):
    """The losses' weights and all that is learned for them beside the student: heads and temperatures.

    A head is one linear map from the student's width D to a teacher's width E, used for image and text
    alike: whatever aligns the two in the student then aligns them in every teacher's space.
    """

    def __init__(self, weights: LossWeights, student_dim: int, teacher_dims: Sequence[int]) -> None:
        super().__init__()
        self.weights = weights
        self.heads = nn.ModuleList(nn.Linear(student_dim, dim, bias=False) for dim in teacher_dims)
        self.cross_log_scales = nn.Parameter(torch.full((len(teacher_dims),), INITIAL_LOG_SCALE))

    def forward(self, student: StudentFeatures, batch: Batch, world: World) -> dict[str, torch.Tensor]:
        """This rank's part of every term before weighting, float32 scalars.

        Every rank computes the whole batch's terms from gathered features and hands back its share of them.
        """
        image, text, groups = (world.gather(tensor) for tensor in (student.image, student.text, batch.groups))
        terms = {"task": task_loss(image, text, student.log_scale.exp(), groups)}
        feature, cross = [], []
        for head, log_scale, target in zip(self.heads, self.cross_log_scales, batch.targets, strict=False):
            present = world.gather(target.present)
            if int(present.sum()) < 2:  # one row has nothing to be contrasted with
                continue
            t_image, t_text = (world.gather(tensor)[present].float() for tensor in (target.image, target.text))
            s_image, s_text = head(image[present]), head(text[present])
            feature.append(feature_loss(s_image, t_image) + feature_loss(s_text, t_text))
            cross.append(cross_loss(s_image, s_text, t_image, t_text, log_scale.exp(), groups[present]))
        if self.asks_teachers(self.weights):
            zero = image.new_zeros(())
            terms["feature"] = torch.stack(feature).mean() if feature else zero
            terms["cross"] = torch.stack(cross).mean() if cross else zero
        return {name: term / world.size for name, term in terms.items()}

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum that is minimised."""
        return torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep temperatures within CLIP's limits; called after every step."""
        self.cross_log_scales.clamp_(0, MAX_LOG_SCALE)

    @staticmethod
    def asks_teachers(weights: LossWeights) -> bool:
        """True when a term needs what teachers said; otherwise rows without a teacher take part too."""
        return weights.feature > 0 or weights.cross > 0
