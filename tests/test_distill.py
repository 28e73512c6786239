"""Distillation: order, resume to the bit, export that open_clip loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_run import in_ranks, quiet, write_run

from mmkd.base.errors import ConfigError, IncompleteStoreError, UserError
from mmkd.cli.distill import distill
from mmkd.distill.batches import Schedule
from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read, student_weights
from mmkd.distill.config import OptimizerConfig, load_run
from mmkd.distill.optimizer import lr_factor, warmup_steps
from mmkd.distill.student import build_student
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.distill.trainer import train
from mmkd.store import FeatureStore
from mmkd.store.writer import move_corpus


def test_schedule_places_every_step_once() -> None:
    schedule = Schedule(rows=10, batch_size=3, epochs=2)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (3, 6)
    assert [schedule.place(step) for step in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_learning_rate_known_values() -> None:
    assert [lr_factor(step, 4, 12) for step in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert lr_factor(4, 4, 12) == 1.0
    assert lr_factor(8, 4, 12) == pytest.approx(0.5)
    assert lr_factor(12, 4, 12) == pytest.approx(0.0)
    assert lr_factor(0, 0, 10) == 1.0
    assert warmup_steps(OptimizerConfig(), 240) == 12
    assert warmup_steps(OptimizerConfig(warmup=0.25), 8) == 2
    assert warmup_steps(OptimizerConfig(warmup_steps=0), 0) == 0
    with pytest.raises(ConfigError, match=r"warmup_steps is 2,000, the run has 240 steps .* `warmup: 0.05`"):
        warmup_steps(OptimizerConfig(warmup_steps=2000), 240)


def test_gather_gives_what_a_teacher_has_and_zero_elsewhere(training_scene: Path, tmp_path: Path) -> None:
    shutil.copytree(training_scene / "features", tmp_path / "s")
    (tmp_path / "s/ledger/00001.two.json").unlink()  # rows 256.. are missing for teacher two
    store = FeatureStore.open(tmp_path / "s")
    rows = np.array([299, 3, 255, 256, 7])
    features = TeacherFeatures(store, ["one", "two"])
    for _ in range(2):
        one, two = features.gather(rows)
        assert one.present.all()
        assert two.present.tolist() == [[there] * 2 for there in (False, True, True, False, True)]
        assert np.array_equal(two.image.numpy()[[1, 2, 4]], store.image("two")[[3, 255, 7]])
        assert not two.image[[0, 3]].any()
        assert np.array_equal(one.text.numpy(), store.text("one")[rows])
        features.reside(torch.device("cpu"))  # the same from memory of its own


@pytest.mark.integration
def test_training_learns(training_scene: Path, ranks: int) -> None:
    report = in_ranks(ranks, write_run(training_scene, f"whole-{ranks}", where="", epochs=3, batch_size=64))
    assert (report.steps, report.resumed_at, report.rows) == (12, 0, 300)
    first = in_ranks(ranks, write_run(training_scene, f"start-{ranks}", where="", epochs=1, batch_size=300)).losses
    assert report.losses["feature"] < 0.8 * first["feature"]


def test_loader_processes_do_not_change_the_result(training_scene: Path, ranks: int) -> None:
    paths = [write_run(training_scene, f"w{n}-{ranks}", epochs=1, data={"workers": n}) for n in (0, 2)]
    losses = [in_ranks(ranks, path).losses for path in paths]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epoch": 3}, ConfigError, r"epoch: unknown key; did you mean 'epochs'"),
        ({"optimizer": {"lrr": 1}}, ConfigError, r"optimizer\.lrr: unknown key; did you mean 'lr'"),
        ({"batch_size": 1}, ConfigError, "batch_size: Input should be greater than 1"),
        ({"batch_size": 301, "where": ""}, UserError, "300 rows match .* fewer than one batch of 301"),
        ({"where": "organ = 'liver'"}, UserError, r"no sample column 'organ'; the store has .*site"),
        ({"where": "site = 's9'"}, UserError, "0 rows match"),
        ({"teachers": ["three"]}, UserError, "no teacher 'three'; it has one, two"),
        (
            {"preset": "distill"},
            ConfigError,
            "preset: 'distill' is unknown; there are distil, large, mmkd_clip, pretrain",
        ),
        ({"preset": 3}, ConfigError, "preset: expected a name or a list of names"),
        ({"preset": "gone.yaml"}, ConfigError, r"cannot read .*gone\.yaml"),
        ({"student": {"start_from": "nowhere"}}, UserError, "nowhere is not a run folder"),
        ({"student": {"start_from": "a", "pretrained": "b"}}, ConfigError, "both name weights to begin with"),
        ({"monitor": {"patience": 3}}, ConfigError, "patience needs monitor.sets"),
        ({"student": {"model": "ViT-Z-99"}}, ConfigError, "'ViT-Z-99' is unknown to open_clip"),
        ({"student": {"model": "gone.json"}}, ConfigError, "cannot be read"),
        ({"out": "features"}, UserError, "features is a store; name a folder of its own for the run"),
        ({"out": "tiny-student.json"}, UserError, "is a file; name a folder of its own"),
        ({"store": "nowhere"}, Exception, "does not exist"),
    ],
)
def test_mistakes_in_a_run(
    training_scene: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        quiet(write_run(training_scene, "mistake", **changes))
    assert "\n" not in str(caught.value)


def test_an_unfinished_store_is_refused(training_scene: Path, tmp_path: Path) -> None:
    from mmkd.store.samples import read_part, with_columns, write_part

    shutil.copytree(training_scene / "features", tmp_path / "features")
    table, _ = read_part(tmp_path / "features", 1)
    write_part(tmp_path / "features", 1, with_columns(table, {"status": ["pending"] * len(table)}))
    shutil.copy(training_scene / "tiny-student.json", tmp_path)
    with pytest.raises(IncompleteStoreError, match="44 of 300 matching rows are not extracted yet"):
        quiet(write_run(tmp_path, "early", where=""))


def test_images_that_are_gone_are_named(training_scene: Path, tmp_path: Path) -> None:
    shutil.copytree(training_scene, tmp_path / "copy")
    root = tmp_path / "copy"
    move_corpus(root / "features", root / "corpus")
    shutil.rmtree(root / "corpus" / "images")
    with pytest.raises(UserError, match=r"^image of row \d+, .*: file not found; .*$"):
        quiet(write_run(root, "gone", data={"workers": 2}))


@pytest.mark.integration
def test_dry_run_says_what_a_run_takes_and_writes_nothing(training_scene: Path) -> None:
    path = write_run(training_scene, "dry")
    before = sorted(training_scene.rglob("*"))
    done = CliRunner().invoke(distill, [str(path), "--dry-run", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    # Before the first step, which may be too large for the machine.
    assert done.stderr.startswith("100 pairs, 2 teachers, student of 0.")
    assert sorted(training_scene.rglob("*")) == before
    config = load_run(path)
    with_average = write_run(training_scene, "dry-average", optimizer={"average": 0.9})
    assert (found["rows"], found["steps"], found["steps_left"]) == ({"pair": 100}, 8, 8)
    assert found["teachers"] == ["one", "two"]
    assert found["student_parameters"] == sum(p.numel() for p in build_student(config.student).parameters())
    assert found["other_parameters"] == 20 * (24 + 32) + 2
    assert found["hours"] == pytest.approx(8 * found["seconds_per_step"] / 3600)
    weighted = found["terms"]
    assert set(weighted) == {"task", "feature", "cross", "total"}
    assert sum(value for name, value in weighted.items() if name != "total") == pytest.approx(weighted["total"])
    assert 2.5 < weighted["task"] < 4  # log 24 at random
    assert found["notes"] == []
    quiet(path)
    size = checkpoints(config.out)[0].stat().st_size
    assert found["checkpoint_bytes"] == pytest.approx(size, rel=0.02)
    lines = CliRunner().invoke(distill, [str(path), "--dry-run"], catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["rows", "parameters", "memory", "steps", "hours", "loss"]
    assert "8 of them done" in lines[3]
    more = CliRunner().invoke(distill, [str(with_average), "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(more.stdout)["checkpoint_bytes"] == pytest.approx(size * 4 / 3, rel=0.02)


def test_what_a_user_may_not_expect_is_said(training_scene: Path) -> None:
    student = json.loads((training_scene / "tiny-student.json").read_text()) | {"init_logit_bias": -10}
    student["text_cfg"]["context_length"] = 4
    (training_scene / "biased.json").write_text(json.dumps(student))
    path = write_run(training_scene, "notes", epochs=1, student={"model": "biased.json"})
    said: list[str] = []
    train(load_run(path), say=said.append)
    assert said[1] == "100.0% of the captions fill the context of 4 tokens and may be cut there"
    assert said[2] == "the student's logit_bias is not trained: no loss here uses it"


def test_presets_lie_under_the_run_and_over_each_other(training_scene: Path) -> None:
    (training_scene / "mine.yaml").write_text(
        "epochs: 3\noptimizer: {lr: 2.0e-3, clip_norm: 5.0}\nloss: {cross: 0.5}\n"
    )
    config = load_run(
        write_run(training_scene, "preset", preset=["distil", "large", "mine.yaml"], optimizer={"lr": 1e-3})
    )
    assert config.preset == ("distil", "large", "mine.yaml")
    assert (config.epochs, config.optimizer.lr, config.optimizer.clip_norm) == (2, 1e-3, 5.0)
    assert (config.loss.cross, config.loss.task, config.optimizer.layer_decay) == (0.5, 1.0, 0.9)
    assert load_run(write_run(training_scene, "one-preset", preset="pretrain")).loss.feature == 0


def test_stage_one_needs_no_teacher_and_stage_two_begins_with_its_student(training_scene: Path, ranks: int) -> None:
    fast = {"lr": 1e-3, "warmup_steps": 0}
    first = write_run(training_scene, f"stage1-{ranks}", preset="pretrain", optimizer=fast)
    report = in_ranks(ranks, first)
    assert set(report.losses) == {"task", "total"}
    student = {"model": "tiny-student.json", "start_from": f"runs/stage1-{ranks}"}
    still = {"lr": 1e-12}
    second = write_run(training_scene, f"stage2-{ranks}", preset="distil", student=student, optimizer=still)
    assert set(in_ranks(ranks, second).losses) == {"task", "feature", "relational", "total"}
    weights = [student_weights(read(find_checkpoint(load_run(path).out))) for path in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-6), name
