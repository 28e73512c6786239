"""Fields of a run.yaml reach what they are for: crops, moments, timeouts."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_run import write_run

from mmkd.base.errors import UserError
from mmkd.distill import images, trainer
from mmkd.distill.config import DataConfig, OptimizerConfig, load_run
from mmkd.distill.images import StoredImages
from mmkd.distill.optimizer import make_optimizer
from mmkd.distill.prepare import prepare
from mmkd.distill.world import World, join_ranks

CPU = World(torch.device("cpu"))


def test_betas_are_adamws() -> None:
    model = torch.nn.Linear(2, 2)
    groups = make_optimizer(model, OptimizerConfig(betas=(0.5, 0.7))).param_groups
    assert {group["betas"] for group in groups} == {(0.5, 0.7)}


def test_other_ranks_are_waited_for_as_long_as_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[Any] = []

    def join(backend: str, timeout: timedelta) -> None:
        waits.append(timeout)
        raise dist.DistError("nobody")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(UserError), join_ranks(0.25):
        pass
    assert waits == [timedelta(seconds=15)]
    monkeypatch.setattr(trainer, "join_ranks", lambda minutes: waits.append(minutes) or join_ranks(minutes))
    with pytest.raises(UserError):
        trainer.train(load_run(write_run(tmp_path, "r", compute={"timeout_minutes": 7.5})))
    assert waits[1:] == [7.5, timedelta(minutes=7.5)]


@pytest.mark.parametrize("said", [True, False])
def test_teachers_and_captions_are_taken_as_the_loss_says(training_scene: Path, said: bool) -> None:
    loss = {"unit_teachers": said, "equal_captions": said, "bank": 1.0, "bank_rows": {"size": 50, "refresh": 9}}
    side = prepare(load_run(write_run(training_scene, f"said-{said}", loss=loss)), CPU).update.model.objective.side
    assert side.prepare.to_unit is said
    # With a group of its own a row is the positive of no other; else it is its caption's.
    assert np.array_equal(side.bank.group, side.bank.rows) is not said


def test_crops_cover_the_share_of_the_image_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    student = SimpleNamespace(visual=SimpleNamespace(preprocess_cfg={"size": (32, 32)}))
    device = torch.device("cpu")
    for decode in ("workers", "device"):
        data = DataConfig(crop_scale=(0.2, 0.3), decode=decode)
        pictures = images.train_pictures(StoredImages.__new__(StoredImages), data, student, device, None)
        crop = pictures.args[1].transforms[0] if decode == "workers" else pictures.args[1]
        assert tuple(crop.scale) == (0.2, 0.3)
