"""Pooling: how the tokens of an encoder become one feature, as the authors of each use it."""

from __future__ import annotations

from typing import Literal

import torch

Pooling = Literal["model", "class", "mean", "class_mean"]
"""`model`: the model's own (timm's `global_pool`, transformers' `pooler_output`: an attention pool, a dense layer);
`class`: the first token; `mean`: of the patches, or of a caption's tokens; `class_mean`: both, one after the other."""


def pool_tokens(states: torch.Tensor, pooling: Pooling, counted: torch.Tensor | int) -> torch.Tensor:
    """Return (B, D), of `class_mean` (B, 2 D). `states`: (B, N, D), the class token first. `counted`: the tokens that a
    mean is over, bool (B, N), or the number of the first."""
    if pooling == "class":
        return states[:, 0]
    if isinstance(counted, int):
        mean = states[:, counted:].mean(1)
    else:
        weights = counted.to(states.dtype)[:, :, None]
        mean = (states * weights).sum(1) / weights.sum(1)
    return mean if pooling == "mean" else torch.cat([states[:, 0], mean], dim=1)
