"""Distillation: order, resume to the bit, export that open_clip loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import quiet, write_run

from mmkd.distill.optimiser import lr_factor
from mmkd.distill.order import Schedule, batch_rows, epoch_order
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.store import FeatureStore
from mmkd.store.errors import ConfigError, IncompleteStoreError, UserError
from mmkd.store.writer import move_corpus


@given(st.integers(2, 500), st.integers(0, 2**32), st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    rows = np.arange(n, dtype=np.int64) * 3
    order = epoch_order(rows, seed, epoch)
    assert sorted(order.tolist()) == rows.tolist()
    assert np.array_equal(order, epoch_order(rows, seed, epoch))


def test_epochs_and_seeds_differ() -> None:
    rows = np.arange(100, dtype=np.int64)
    orders = {tuple(epoch_order(rows, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_schedule_places_every_step_once() -> None:
    schedule = Schedule(rows=10, batch_size=3, epochs=2)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (3, 6)
    assert [schedule.place(step) for step in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert batch_rows(np.arange(10), 2, 3).tolist() == [6, 7, 8]


def test_learning_rate_known_values() -> None:
    assert [lr_factor(step, 4, 12) for step in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert lr_factor(4, 4, 12) == 1.0
    assert lr_factor(8, 4, 12) == pytest.approx(0.5)
    assert lr_factor(12, 4, 12) == pytest.approx(0.0)
    assert lr_factor(0, 0, 10) == 1.0


def test_gather_gives_what_a_teacher_has_and_zero_elsewhere(scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene / "features", tmp_path / "s")
    (tmp_path / "s/ledger/00001.two.json").unlink()  # rows 256.. are missing for teacher two
    store = FeatureStore.open(tmp_path / "s")
    rows = np.array([299, 3, 255, 256, 7])
    features = TeacherFeatures(store, ["one", "two"])
    for _ in range(2):
        one, two = features.gather(rows)
        assert one.present.all()
        assert two.present.tolist() == [False, True, True, False, True]
        assert np.array_equal(two.image.numpy()[[1, 2, 4]], store.image("two")[[3, 255, 7]])
        assert not two.image[[0, 3]].any()
        assert np.array_equal(one.text.numpy(), store.text("one")[rows])
        features.reside(torch.device("cpu"))  # the same from memory of its own


def test_training_learns(scene: Path) -> None:
    report = quiet(write_run(scene, "whole", epochs=3))
    assert (report.steps, report.resumed_at, report.rows) == (12, 0, 300)
    first = quiet(write_run(scene, "first-loss", epochs=1, batch_size=300)).losses
    assert report.losses["feature"] < 0.8 * first["feature"]


def test_loader_processes_do_not_change_the_result(scene: Path) -> None:
    losses = [quiet(write_run(scene, f"w{n}", epochs=1, data={"workers": n})).losses for n in (0, 2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epoch": 3}, ConfigError, r"epoch: unknown key; did you mean 'epochs'"),
        ({"optimiser": {"lrr": 1}}, ConfigError, r"optimiser\.lrr: unknown key; did you mean 'lr'"),
        ({"batch_size": 1}, ConfigError, "batch_size: Input should be greater than 1"),
        ({"batch_size": 301}, UserError, "300 rows match .* fewer than one batch of 301"),
        ({"where": {"organ": "liver"}}, UserError, r"no sample column 'organ'; it has .*site"),
        ({"where": {"site": "s9"}}, UserError, "0 rows match"),
        ({"teachers": ["three"]}, UserError, "no teacher 'three'; it has one, two"),
        ({"student": {"model": "ViT-Z-99"}}, ConfigError, "'ViT-Z-99' is unknown to open_clip"),
        ({"student": {"model": "gone.json"}}, ConfigError, "cannot be read"),
        ({"store": "nowhere"}, Exception, "does not exist"),
    ],
)
def test_mistakes_in_a_run(scene: Path, changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        quiet(write_run(scene, "mistake", **changes))
    assert "\n" not in str(caught.value)


def test_an_unfinished_store_is_refused(scene: Path, tmp_path: Path) -> None:
    from mmkd.store.samples import read_part, with_columns, write_part

    shutil.copytree(scene / "features", tmp_path / "features")
    table, _ = read_part(tmp_path / "features", 1)
    write_part(tmp_path / "features", 1, with_columns(table, {"status": ["pending"] * len(table)}))
    shutil.copy(scene / "tiny-student.json", tmp_path)
    with pytest.raises(IncompleteStoreError, match="44 of 300 matching rows are not extracted yet"):
        quiet(write_run(tmp_path, "early"))


def test_images_that_are_gone_are_named(scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene, tmp_path / "copy")
    root = tmp_path / "copy"
    move_corpus(root / "features", root / "corpus")
    shutil.rmtree(root / "corpus" / "images")
    with pytest.raises(UserError, match=r"^image of row \d+, .*: file not found; .*$"):
        quiet(write_run(root, "gone", data={"workers": 2}))
