"""Checkpoints: what a run ends with does not depend on how often, how and when it was interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import quiet, write_run

from mmkd.base.errors import CorruptStoreError, StoreError, UserError
from mmkd.distill.checkpoint import best_or_last, checkpoints, step_of
from mmkd.distill.config import load_run
from mmkd.distill.trainer import train
from mmkd.store import FeatureStore


@pytest.fixture(scope="module")
def whole(training_scene: Path) -> bytes:
    """The last checkpoint of an uninterrupted run of eight steps in two epochs."""
    config = load_run(write_run(training_scene, "whole-run"))
    assert quiet(config).steps == 8
    return best_or_last(config.out).read_bytes()


def test_a_signal_saves_and_the_run_goes_on_to_the_same_bytes(training_scene: Path, whole: bytes) -> None:
    # Interrupted after every step: within epochs, between them, and before the last step.
    config = load_run(write_run(training_scene, "signalled", checkpoints={"stop_signals": ["SIGUSR1"]}))
    for step in range(8):
        report = train(config, say=lambda _: os.kill(os.getpid(), signal.SIGUSR1))
        assert (report.resumed_at, report.steps, report.stopped) == (step, step + 1, "SIGUSR1")
    assert best_or_last(config.out).read_bytes() == whole
    assert quiet(config).resumed_at == 8  # nothing is left to do
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def killed_again_and_again(path: Path, kills: int, seed: int) -> int:
    """Run in child processes that are killed without warning; returns how many were killed before the end."""
    rng = np.random.default_rng(seed)
    for attempt in range(kills + 1):
        child = multiprocessing.get_context("fork").Process(target=quiet, args=(path,))
        child.start()
        if attempt < kills:
            child.join(rng.uniform(0.05, 0.5))
            child.kill()
        child.join()
        if child.exitcode == 0:
            return attempt
        assert child.exitcode == -signal.SIGKILL
    raise AssertionError("the run did not come to its end")


def test_kill_9_at_random_moments(training_scene: Path, whole: bytes) -> None:
    path = write_run(training_scene, "killed", checkpoints={"every_steps": 1})
    assert killed_again_and_again(path, kills=5, seed=0) > 0
    assert best_or_last(load_run(path).out).read_bytes() == whole
    assert not list(load_run(path).out.rglob("*.mmkd-tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_kill_9_at_many_random_moments(training_scene: Path, whole: bytes, seed: int) -> None:
    path = write_run(training_scene, f"killed-{seed}", checkpoints={"every_steps": 1})
    killed_again_and_again(path, kills=15, seed=seed)
    assert best_or_last(load_run(path).out).read_bytes() == whole


def test_what_lies_beside_a_run_may_change(training_scene: Path, whole: bytes, tmp_path: Path) -> None:
    config = load_run(write_run(training_scene, "moved", epochs=2, checkpoints={"stop_signals": ["SIGTERM"]}))
    train(config, say=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    for name in ("features", "tiny-student.json"):
        copy = shutil.copytree if (training_scene / name).is_dir() else shutil.copy
        copy(training_scene / name, tmp_path / name)
    shutil.copytree(config.out, tmp_path / "runs" / "moved")
    # Another place, other workers, features in memory, checkpoints at other times.
    path = write_run(tmp_path, "moved", data={"workers": 2, "features": "resident"}, checkpoints={"every_steps": 3})
    assert quiet(path).resumed_at == 1
    assert best_or_last(load_run(path).out).read_bytes() == whole


def test_only_the_last_checkpoints_and_the_best_are_kept(training_scene: Path) -> None:
    config = load_run(write_run(training_scene, "kept", checkpoints={"every_steps": 2, "keep_last": 1}))
    quiet(config)
    assert [step_of(path) for path in checkpoints(config.out)] == [8]
    (config.out / "best.json").write_text('{"step": 8}')
    assert step_of(best_or_last(config.out)) == 8


def test_a_checkpoint_of_another_run_is_refused(training_scene: Path) -> None:
    quiet(write_run(training_scene, "other", epochs=1))
    with pytest.raises(UserError, match="another configuration or store") as caught:
        quiet(write_run(training_scene, "other", epochs=1, seed=5, optimiser={"lr": 2e-3}))
    assert "\n" not in str(caught.value)
    assert "(seed was 0, is 5; optimiser.lr was 0.001, is 0.002); name another `out`" in str(caught.value)
    (training_scene / "runs/other/run.json").unlink()
    with pytest.raises(UserError, match=r"\(digest [0-9a-f]{16}, this one has [0-9a-f]{16}\)"):
        quiet(write_run(training_scene, "other", epochs=1, seed=5))


def test_a_store_that_gained_a_teacher_is_another_run(training_scene: Path, tmp_path: Path) -> None:
    shutil.copytree(training_scene / "features", tmp_path / "features")
    shutil.copy(training_scene / "tiny-student.json", tmp_path)
    store = FeatureStore.open(tmp_path / "features")
    config = load_run(write_run(tmp_path, "grown", teachers=["one"], epochs=1))
    quiet(config)
    assert set(store.teachers) == {"one", "two"}
    with pytest.raises(UserError, match="another configuration or store"):
        quiet(write_run(tmp_path, "grown", epochs=1))


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_there(training_scene: Path) -> None:
    config = load_run(write_run(training_scene, "damaged", checkpoints={"every_steps": 4}))
    quiet(config)
    earlier, last = checkpoints(config.out)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CorruptStoreError, match=r"is damaged .*; delete it to go on from the one before"):
        quiet(config)
    last.unlink()
    assert quiet(config).resumed_at == step_of(earlier) == 4


def test_a_loss_that_is_not_a_number_names_its_batch(training_scene: Path) -> None:
    config = load_run(write_run(training_scene, "nan", optimiser={"lr": 1e30, "warmup_steps": 0}))
    with pytest.raises(UserError, match=r"at step 1 \(epoch 0\), rows \d+, .*lower optimiser\.lr") as caught:
        quiet(config)
    assert "\n" not in str(caught.value)
    note = json.loads((config.out / "bad-batch.json").read_text())
    assert (note["step"], len(note["rows"])) == (1, 24)
    assert checkpoints(config.out) == []


def test_a_full_disk_leaves_the_checkpoint_before(training_scene: Path) -> None:
    path = write_run(training_scene, "full", checkpoints={"every_steps": 4})
    config = load_run(path)

    def run_with_little_room() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            quiet(path)
        except StoreError as error:
            (config.out / "error").write_text(str(error))

    child = multiprocessing.get_context("fork").Process(target=run_with_little_room)
    child.start()
    child.join()
    assert (config.out / "error").read_text().startswith("cannot write")
    assert checkpoints(config.out) == []
    assert list((config.out / "checkpoints").iterdir()) == []
    assert quiet(path).steps == 8


def test_time_is_not_in_a_checkpoint(training_scene: Path, whole: bytes) -> None:
    config = load_run(write_run(training_scene, "again"))
    time.sleep(0.01)
    quiet(config)
    assert best_or_last(config.out).read_bytes() == whole
