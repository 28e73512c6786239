"""A tiny student with heads for two teachers, and a batch for it, without a store."""

from __future__ import annotations

import numpy as np
import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from tiny_teachers import TINY

from mmkd.distill.batches import Batch
from mmkd.distill.config import LossConfig, PolicyConfig
from mmkd.distill.objective import Objective, TeacherSide
from mmkd.distill.policies import Policy
from mmkd.distill.student import Towers
from mmkd.distill.teacher_features import TeacherTargets
from mmkd.distill.teacher_side import Heads, Preparation
from mmkd.distill.train_step import Model


def objective() -> Objective:
    """The default terms for a student 24 wide and teachers 6 and 8 wide."""
    slugs = ("a", "b")
    heads = Heads("linear", 24, slugs, [6, 8])
    side = TeacherSide(heads, Preparation(slugs, None, to_unit=True), Policy(PolicyConfig(), seed=0), [10.0, 10.0])
    return Objective(LossConfig(), side)


def parts(seed: int = 0, rows: int = 12) -> tuple[Model, Batch]:
    """A tiny model with two teachers, and a batch in which the second teacher lacks rows."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**TINY | {"text_cfg": TINY["text_cfg"] | {"width": 16}})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    model = Model(Towers(clip), objective())
    targets = tuple(
        TeacherTargets(torch.randn(rows, e), torch.randn(rows, e), (torch.rand(rows, 1) < p).expand(-1, 2))
        for e, p in ((6, 2), (8, 0.6))
    )
    batch = Batch(
        step=0,
        epoch=0,
        rows=np.arange(rows),
        positions=torch.arange(rows),
        images=torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8),
        tokens=torch.randint(1, 49408, (rows, 16)),
        columns=(16,) * rows,
        groups=torch.arange(rows) % 9,
        targets=targets,
    )
    return model, batch
