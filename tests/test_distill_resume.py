"""What a run ends with does not depend on how often, how and when it was interrupted, in one rank or two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked_ranks
from safetensors.torch import load_file
from tiny_run import in_ranks, quiet, stopped_at_first_step, write_run

from mmkd.distill import checkpoint
from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read, step_of, student_weights
from mmkd.distill.config import load_run
from mmkd.distill.export import export
from mmkd.distill.trainer import TrainReport

JUDGED = {"every_steps": 2, "sets": [{"name": "s1", "where": "site = 's1'", "limit": 30}]}
WHOLE: dict[str, Any] = {"monitor": JUDGED, "optimizer": {"lr": 1e-3, "warmup": 0.25, "average": 0.9}}


def result(out: Path) -> list[bytes]:
    """The last checkpoint of a run and its best one."""
    return [find_checkpoint(out, which).read_bytes() for which in ("last", "best")]


Whole = Callable[[int], list[bytes]]


@pytest.fixture(scope="module")
def whole(training_scene: Path) -> Whole:
    """The result of an uninterrupted run of eight steps in two epochs, with averaged weights and four validations."""

    @cache
    def of(ranks: int) -> list[bytes]:
        path = write_run(training_scene, f"whole-run-{ranks}", **WHOLE)
        assert in_ranks(ranks, path).steps == 8
        return result(load_run(path).out)

    return of


@pytest.mark.integration
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bytes(training_scene: Path, whole: Whole, ranks: int) -> None:
    # One rank is interrupted after every step: within epochs, between them, and before the last step.
    path = write_run(training_scene, f"signalled-{ranks}", **WHOLE, checkpoints={"stop_signals": ["SIGUSR1"]})
    stops = 8 if ranks == 1 else 2
    for step in range(stops):
        report = in_ranks(ranks, path, stopped_at_first_step)
        assert (report.resumed_at, report.steps, report.stopped) == (step, step + 1, "SIGUSR1")
    assert in_ranks(ranks, path).resumed_at == stops  # one rank has nothing left to do
    assert result(load_run(path).out) == whole(ranks)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def killed_again_and_again(path: Path, ranks: int, kills: int, seed: int) -> int:
    """Run in child processes, all or one of which are killed without warning; returns how often, before the end."""
    rng = np.random.default_rng(seed)
    for attempt in range(kills + 1):
        children = forked_ranks(ranks, quiet, path)
        if attempt < kills:
            children[0].join(rng.uniform(0.05, 0.5 * ranks))
            for victim in (children, children[:1], children[-1:])[rng.integers(3)]:
                victim.kill()
        for child in children:
            child.join()
        codes = {child.exitcode for child in children}
        if codes == {0}:
            return attempt
        assert -signal.SIGKILL in codes
    raise AssertionError("the run did not come to its end")


@pytest.mark.integration
def test_kill_9_at_random_moments(training_scene: Path, whole: Whole, ranks: int) -> None:
    path = write_run(training_scene, f"killed-{ranks}", **WHOLE, checkpoints={"every_steps": 1})
    assert killed_again_and_again(path, ranks, kills=6 // ranks, seed=0) > 0
    assert result(load_run(path).out) == whole(ranks)
    assert not list(load_run(path).out.rglob("*.mmkd-tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_kill_9_at_many_random_moments(training_scene: Path, whole: Whole, seed: int, ranks: int) -> None:
    path = write_run(training_scene, f"killed-{seed}-{ranks}", **WHOLE, checkpoints={"every_steps": 1})
    killed_again_and_again(path, ranks, kills=15, seed=seed)
    assert result(load_run(path).out) == whole(ranks)


def killed_behind(path: Path, step: int) -> TrainReport:
    """Die of SIGKILL as soon as the checkpoint of this step has its name: before older ones go."""
    write = checkpoint._write_atomically

    def write_and_die(file: Path, *rest: Any) -> None:
        write(file, *rest)
        if step_of(file) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write_atomically = write_and_die
    return quiet(path)


@pytest.mark.integration
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 7))])
def test_kill_9_right_behind_a_checkpoint(
    training_scene: Path, whole: Whole, tmp_path: Path, ranks: int, seed: int
) -> None:
    """What is said of the run is then of that checkpoint, and the run goes on from it to the same bytes."""
    changes = {"every_steps": 1, "keep_last": 1}
    path = write_run(training_scene, f"behind-{seed}-{ranks}", **WHOLE, checkpoints=changes)
    out = load_run(path).out
    for step in np.sort(np.random.default_rng(seed).choice(np.arange(1, 8), 2, replace=False)).tolist():
        children = forked_ranks(ranks, killed_behind, path, step)
        for child in children:
            child.join()
        # The other rank notices, says so and ends.
        assert [child.exitcode for child in children] == [-signal.SIGKILL, 1][:ranks]
        last, best = (find_checkpoint(out, which) for which in ("last", "best"))
        assert step_of(last) == step
        progress = read(last).progress
        assert (progress.best_step is None) == (step < 2)  # before the first validation
        assert step_of(best) == (progress.best_step or step)
        folder = export(out, tmp_path / str(step))
        facts = json.loads((folder / "mmkd_run.json").read_text())
        assert (facts["steps"], facts["scores"]) == (step_of(best), progress.best_scores)
        weights, exported = student_weights(read(best)), load_file(folder / "open_clip_model.safetensors")
        assert all(torch.equal(value, exported[name]) for name, value in weights.items())
    assert in_ranks(ranks, path).resumed_at == step
    assert result(out) == whole(ranks)
    assert len(checkpoints(out)) <= 2


def test_what_lies_beside_a_run_may_change(training_scene: Path, whole: Whole, tmp_path: Path, ranks: int) -> None:
    path = write_run(training_scene, f"moved-{ranks}", **WHOLE)
    in_ranks(ranks, path, stopped_at_first_step)
    out = load_run(path).out
    for name in ("features", "tiny-student.json"):
        copy = shutil.copytree if (training_scene / name).is_dir() else shutil.copy
        copy(training_scene / name, tmp_path / name)
    shutil.copytree(out, tmp_path / "runs" / "moved")
    # Another place, other workers, features in memory, checkpoints at other times.
    data = {"workers": 2, "features": "resident"}
    path = write_run(tmp_path, "moved", **WHOLE, data=data, checkpoints={"every_steps": 3})
    assert in_ranks(ranks, path).resumed_at == 1
    assert result(load_run(path).out) == whole(ranks)


def test_time_is_not_in_a_checkpoint(training_scene: Path, whole: Whole, ranks: int) -> None:
    expected, path = whole(ranks), write_run(training_scene, f"again-{ranks}", **WHOLE)
    time.sleep(0.01)
    in_ranks(ranks, path)
    assert result(load_run(path).out) == expected
