"""A run learns from the pairs of its selection and from no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planted_store import make_planted

from mmkd.base.errors import UserError
from mmkd.distill.config import RunConfig
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.store import FeatureStore
from mmkd.store.selection import SelectionRule, select


def test_targets_are_those_of_the_selection(tmp_path: Path) -> None:
    store = FeatureStore.open(make_planted(tmp_path, {"far": 2.0, "near": 0.3}).root)
    rule = {"any": [{"cosine": {"at_least": 0.8}}]}
    select(store, "good", SelectionRule.model_validate({"keep": rule}))
    kept = store.available("good")
    rows = np.arange(0, 300, 3)
    everything = TeacherFeatures(store, ("near", "far")).gather(rows)
    chosen = TeacherFeatures(store, ("near", "far"), "good")
    assert np.array_equal(chosen.any_available(), kept.any(axis=1))
    for target, before, column in zip(chosen.gather(rows), everything, (1, 0), strict=True):
        assert np.array_equal(target.present.numpy(), kept[rows, column][:, None].repeat(2, axis=1))
        assert before.present.all()
        present = target.present[:, 0]
        assert np.array_equal(target.image[present].numpy(), before.image[present].numpy())
        assert not target.image[~present].any()
    with pytest.raises(UserError, match="has no selection 'bad'; it has good"):
        TeacherFeatures(store, ("near",), "bad")
    assert RunConfig.model_fields["selection"].default is None
