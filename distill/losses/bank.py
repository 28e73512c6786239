"""Interactive contrast against far more keys than a batch has: stored teacher features cost only a gather."""

from __future__ import annotations

import torch

from mmkd.distill.losses.contrast import both_ways
from mmkd.distill.losses.pair_features import PairFeatures


def bank_loss(student: PairFeatures, teacher: PairFeatures, bank: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """`cross_loss` with the bank's rows as further keys, float (Q,).

    ``1/2 [ contrast(s_img, T_txt + B_txt) + contrast(s_txt, T_img + B_img) ]``, + for one list after the other.
    Unlike a queue of momentum features (MoCo, arXiv 1911.05722) these keys never age: the teacher does not move.
    A bank row with the caption of a query is a positive. Rows of the batch itself must not be available
    in the bank, so that no key counts twice; with a bank of all rows the value is then that of the whole data set,
    whatever the batch.
    """
    keys = PairFeatures(
        torch.cat([teacher.image, bank.image]),
        torch.cat([teacher.text, bank.text]),
        torch.cat([teacher.group, bank.group]),
        torch.cat([teacher.mask, bank.mask]),
    )
    return both_ways(student, keys, scale)
