"""`mmkd distill` as a process: exit statuses, one line for a mistake, signals that save first."""

from __future__ import annotations

import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import forked_command, launched
from tiny_run import write_run

from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read, step_of
from mmkd.distill.config import load_run
from mmkd.store import FeatureStore
from mmkd.store.selection import SelectionRule, select
from mmkd.store.writer import move_corpus


def ended(child: BaseProcess, log: Path) -> tuple[int | None, list[str]]:
    """Exit status, and the lines that it said."""
    child.join(timeout=120)
    return child.exitcode, log.read_text().splitlines()


def wait_for(log: Path, word: str) -> None:
    """Until the process has said it."""
    deadline = time.monotonic() + 200
    while not log.is_file() or word not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.is_file() else "nothing was said"
        time.sleep(0.02)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_saves_first_and_the_same_command_goes_on(
    training_scene: Path, tmp_path: Path, name: str, status: int
) -> None:
    # No checkpoint is due for a long time: the one that is found is the signal's.
    path = write_run(training_scene, f"process-{name}", epochs=5000, checkpoints={"every_steps": 10**6})
    child = forked_command(tmp_path / "log", "distill", path)
    wait_for(tmp_path / "log", "100 pairs, 2 teachers")
    assert child.pid is not None
    os.kill(child.pid, signal.Signals[name])
    found, lines = ended(child, tmp_path / "log")
    assert found == status
    assert f"stopped by {name} with the state saved; the same command continues" in lines
    (saved,) = checkpoints(load_run(path).out)
    done = step_of(saved)
    assert read(saved).progress.step == done >= 1
    assert f"{done} steps in " in "\n".join(lines)
    again = forked_command(tmp_path / "again", "distill", path)
    wait_for(tmp_path / "again", f"from step {done:,}")
    assert again.pid is not None
    os.kill(again.pid, signal.SIGTERM)
    assert ended(again, tmp_path / "again")[0] == 143
    assert step_of(find_checkpoint(load_run(path).out)) > done


def test_a_second_signal_ends_at_once(training_scene: Path, tmp_path: Path) -> None:
    """Whoever asks twice does not want to wait: the signal then acts as it always did."""
    from mmkd.distill.trainer import stop_on

    with stop_on(["SIGUSR2"]) as received:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert received == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_a_finished_run_ends_with_0_and_says_what_comes_next(training_scene: Path, tmp_path: Path) -> None:
    path = write_run(training_scene, "process-whole", epochs=1)
    status, lines = ended(forked_command(tmp_path / "log", "distill", path), tmp_path / "log")
    assert status == 0
    assert lines[-1] == f"next: mmkd export {load_run(path).out} STUDENT_DIR"
    assert any(line.startswith("4 steps in ") and "waiting for data; losses: task " in line for line in lines)
    status, lines = ended(forked_command(tmp_path / "again", "distill", path), tmp_path / "again")
    assert status == 0
    assert lines[-2].startswith("all 4 steps were done before: nothing to do; ")


def one_line(training_scene: Path, tmp_path: Path, **changes: object) -> str:
    """What `mmkd distill` complains of: exit status 1 and exactly one line that begins with Error."""
    path = write_run(training_scene, "process-wrong", **changes)
    status, lines = ended(forked_command(tmp_path / "log", "distill", path), tmp_path / "log")
    assert status == 1
    assert not any("Traceback" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("Error: ")]
    return line


def test_a_loss_that_is_not_a_number_is_one_line(training_scene: Path, tmp_path: Path) -> None:
    line = one_line(training_scene, tmp_path, optimizer={"lr": 1e30, "warmup_steps": 0})
    assert "at step 1 (epoch 0), rows " in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teachers": ["three"]}, "no teacher 'three'; it has one, two"),
        ({"selection": "none-such"}, "has no selection 'none-such'"),
        ({"heads": {"kind": "none"}}, "the student's 20 numbers with those of one (24), two (32)"),
        ({"batch_size": 101}, "100 rows match site = 's0' and have a teacher, fewer than one batch of 101"),
        ({"seeds": 3}, "seeds: unknown key; did you mean 'seed'"),
    ],
)
def test_store_and_configuration_that_disagree_are_one_line(
    training_scene: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    assert words in one_line(training_scene, tmp_path, **changes)


def test_images_that_go_while_it_trains_are_one_line(training_scene: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(training_scene, root, ignore=shutil.ignore_patterns("runs"))
    move_corpus(root / "features", root / "corpus")
    path = write_run(root, "going", epochs=5000, data={"workers": 2}, checkpoints={"every_steps": 3})
    child = forked_command(tmp_path / "log", "distill", path)
    while not checkpoints(load_run(path).out):
        time.sleep(0.02)
        assert child.is_alive(), (tmp_path / "log").read_text()
    shutil.rmtree(root / "corpus/images")
    status, lines = ended(child, tmp_path / "log")
    assert status == 1
    (line,) = [line for line in lines if line.startswith("Error: ")]
    assert "file not found; it was sound when extracted: bring it back, note where" in line
    assert "mmkd store relocate" in line
    assert not any("Traceback" in line for line in lines)


def test_a_selection_that_was_made_anew_is_another_run(training_scene: Path, tmp_path: Path) -> None:
    shutil.copytree(training_scene / "features", tmp_path / "features")
    shutil.copy(training_scene / "tiny-student.json", tmp_path)
    store = FeatureStore.open(tmp_path / "features")
    for limit in (-1.0, 0.0):
        select(store, "kept", SelectionRule.model_validate({"keep": {"cosine": {"at_least": limit}}}))
        path = write_run(tmp_path, "selected", selection="kept", epochs=1)
        status, lines = ended(forked_command(tmp_path / "log", "distill", path), tmp_path / "log")
        assert status == (0 if limit == -1.0 else 1), lines
        shutil.rmtree(tmp_path / "features/selections/kept")
    assert "holds a run of another configuration or store" in lines[-1]


@pytest.mark.slow
def test_torchrun_that_is_told_to_end_saves_first(training_scene: Path, tmp_path: Path) -> None:
    """As Slurm does before it takes the node: the launcher hands the signal on, and waits."""
    path = write_run(training_scene, "process-torchrun", epochs=5000, checkpoints={"every_steps": 10**6})
    with launched(path, tmp_path / "log") as process:
        wait_for(tmp_path / "log", "100 pairs, 2 teachers")
        time.sleep(0.5)
        process.terminate()
        assert process.wait(timeout=120) != 0
    (saved,) = checkpoints(load_run(path).out)
    assert read(saved).progress.step == step_of(saved) >= 1
    assert "stopped by SIGTERM with the state saved" in (tmp_path / "log").read_text()
