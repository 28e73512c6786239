"""InfoNCE with any number of positives: the one formula under the task, cross and bank losses."""

from __future__ import annotations

import torch

from mmkd.distill.losses.pair_features import PairFeatures


def contrast(
    queries_QD: torch.Tensor,
    keys_KD: torch.Tensor,
    scale: torch.Tensor,
    positive_QK: torch.Tensor,
    available_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each query against the available keys A, float (..., Q).

    With P(i) the positive keys of i among A:
    ``v_i = log sum_{j in A} exp(s q_i . k_j)  -  1/|P(i)| sum_{j in P(i)} s q_i . k_j``.
    With one positive a query it is CLIP's loss in one direction (arXiv 2103.00020, figure 3); with several it is
    the form of supervised contrast that keeps the mean outside the logarithm (arXiv 2004.11362, equation 2).
    A query without a positive gives the first term alone; the caller weighs it 0. Several teachers may go in at once,
    in front of the other axes: features (T, n, D), scale (T, 1, 1), available (T, K).
    """
    logits_QK = scale * queries_QD @ keys_KD.mT
    if available_K is not None:
        # The lowest number and not -inf: with no key at all the value stays finite, and 0 * inf never happens.
        available_1K = available_K[..., None, :]
        logits_QK = logits_QK.masked_fill(~available_1K, torch.finfo(logits_QK.dtype).min)
        positive_QK = positive_QK & available_1K
    matched_Q = torch.where(positive_QK, logits_QK, 0).sum(-1) / positive_QK.sum(-1).clamp_min(1)
    return logits_QK.logsumexp(-1) - matched_Q


def both_ways(queries: PairFeatures, keys: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """Mean of `contrast` of images against texts and of texts against images, float (..., Q)."""
    positive_QK = queries.group[:, None] == keys.group[None, :]
    to_text = contrast(queries.image, keys.text, scale, positive_QK, keys.available)
    to_image = contrast(queries.text, keys.image, scale, positive_QK, keys.available)
    return (to_text + to_image) / 2
