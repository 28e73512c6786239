"""Views in training: the picture that was extracted, the teachers' features of it, drawn alike by everybody."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_teacher import Seer
from in_process import extracted, load, run
from PIL import Image
from tiny_run import assert_equal_ends, in_ranks, quiet, stopped_at_first_step, write_run, write_scene

from mmkd.base.errors import ConfigError, UserError
from mmkd.base.images.views import Views
from mmkd.distill.config import load_run
from mmkd.distill.prepare import prepare
from mmkd.distill.student import student_pixels
from mmkd.distill.views import find_views
from mmkd.distill.world import World
from mmkd.store import FeatureStore

ROWS, RECIPE = 60, Views(count=3, seed=5, area=(0.3, 0.8), flip=True)
ALONE = World(torch.device("cpu"))
LEARN: dict[str, Any] = {"where": "", "epochs": 2, "batch_size": 20, "data": {"views": True}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scene of tiny runs, with three views of each image."""
    root = write_scene(tmp_path_factory.mktemp("views"), rows=ROWS)
    folders = {name: root / name for name in ("one", "two")}
    extracted(root / "corpus/pairs.csv", root / "features", load(folders, *folders), RECIPE)
    return root


def test_a_step_sees_a_view_and_the_features_of_that_view(root: Path) -> None:
    ready, store = prepare(load_run(write_run(root, "see", **LEARN)), ALONE), FeatureStore.open(root / "features")
    pixels, seen = student_pixels(ready.update.model.towers.student), set()
    samples = store.sample_table(["key", "uri", "image_rows", "view_number"]).to_pylist()
    view_row = {
        (one["image_rows"][0], one["view_number"]): row for row, one in enumerate(samples) if one["view_number"]
    }
    assert ready.batches.views is not None
    for batch in ready.batches.from_step(0):
        numbers = ready.batches.views.numbers(0, batch.epoch, batch.rows).tolist()
        for place, (row, number) in enumerate(zip(batch.rows.tolist(), numbers, strict=True)):
            picture = Image.open(root / "corpus" / samples[row]["uri"]).convert("RGB")
            assert torch.equal(batch.images[place], pixels(RECIPE.picture(picture, samples[row]["key"], number)))
            for slug, target in zip(("one", "two"), batch.targets, strict=True):
                assert np.array_equal(target.image[place].numpy(), store.image(slug)[view_row[row, number]])
                assert np.array_equal(target.text[place].numpy(), store.text(slug)[row])
                assert target.present[place].all()
            seen.add((row, number))
    assert {row for row, _ in seen} == set(range(ROWS))
    assert {number for _, number in seen} == {1, 2, 3}
    assert ROWS < len(seen) <= 2 * ROWS  # other views in the other epoch


def test_every_view_is_drawn_as_often(root: Path) -> None:
    ready = prepare(load_run(write_run(root, "often", **LEARN)), ALONE)
    assert ready.batches.views is not None
    rows = np.arange(ROWS)
    drawn = np.stack([ready.batches.views.numbers(0, epoch, rows) for epoch in range(300)])
    assert np.bincount(drawn.ravel(), minlength=4)[1:] / drawn.size == pytest.approx([1 / 3] * 3, abs=0.015)
    other = np.stack([ready.batches.views.numbers(1, epoch, rows) for epoch in range(300)])
    assert (drawn == other).mean() == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.integration
def test_ranks_workers_and_resumptions_meet_the_same_views(root: Path) -> None:
    gentle = {"optimizer": {"lr": 1e-4, "warmup_steps": 2}}
    whole, both = (write_run(root, name, **LEARN | gentle) for name in ("whole", "both"))
    report = quiet(whole)
    in_ranks(1, both, stopped_at_first_step)
    write_run(root, "both", **LEARN | gentle | {"data": {"views": True, "workers": 2}})
    assert in_ranks(2, both).losses == pytest.approx(report.losses, rel=1e-4)
    assert_equal_ends(load_run(whole), load_run(both))


def test_stores_and_settings_that_do_not_fit_end_in_one_line(root: Path) -> None:
    for name, data, line in (
        ("inputs", {"images": "inputs"}, "views are cut from the original files, and `images: inputs` reads reduced"),
        ("device", {"decode": "device"}, "views are cut from the original files, and `decode: device` reads reduced"),
    ):
        with pytest.raises(ConfigError, match=line):
            load_run(write_run(root, name, data={"views": True} | data))
    run(root / "corpus/pairs.csv", root / "plain", {"seer": Seer()})
    alone = {"store": "plain", "loss": {"cross": 0.0}}
    with pytest.raises(UserError, match=r"plain has no views; `mmkd extract ... --views V` makes them"):
        quiet(write_run(root, "none", **LEARN | alone))
    shutil.copytree(root / "features", root / "late")
    run(root / "corpus/pairs.csv", root / "late", {"seer": Seer()})
    (root / "late/ledger/00001.seer.json").unlink()
    with pytest.raises(UserError, match=r"data.views: teacher seer has no features of them; run `mmkd extract`"):
        quiet(write_run(root, "late", **LEARN | {"store": "late"}))
    with pytest.raises(UserError, match=r"data.views: 1 of the run's 61 images have no views in"):
        find_views(FeatureStore.open(root / "features"), np.append(np.arange(ROWS), 9_999))
