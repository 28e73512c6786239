"""The losses, as pure functions of features; docs/losses.md has them on one page.

Each takes `PairFeatures` and gives one value a row, float (Q,) or (T, Q) for stacked teachers, so that masks, teachers'
weights and means over ranks are the caller's (`weighted_mean`). They know nothing of process groups: keys are an
argument, and under several ranks the caller hands over the rows of all of them.
"""

from __future__ import annotations

from mmkd.distill.losses.bank import bank_loss
from mmkd.distill.losses.contrast import contrast
from mmkd.distill.losses.cross import cross_loss
from mmkd.distill.losses.feature import FEATURE_KINDS, FeatureKind, feature_loss
from mmkd.distill.losses.pair_features import PairFeatures, stacked, unit, weighted_mean
from mmkd.distill.losses.relational import relational_loss
from mmkd.distill.losses.task import task_loss

__all__ = [
    "FEATURE_KINDS",
    "FeatureKind",
    "PairFeatures",
    "bank_loss",
    "contrast",
    "cross_loss",
    "feature_loss",
    "relational_loss",
    "stacked",
    "task_loss",
    "unit",
    "weighted_mean",
]
