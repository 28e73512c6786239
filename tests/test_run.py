"""`mmkd extract` as a user runs it: a real Dask cluster, real processes, real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from extract_scene import MMKD, Scene, entries, mmkd
from in_process import tree_digest
from tiny_teachers import write_tiny_teacher

from mmkd.cli.main import main
from mmkd.extract import cluster
from mmkd.store import FeatureStore

Said = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.integration


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """The command line in this process, which has torch already: status, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmkd", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # a long command puts its own in front
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_store_is_complete_and_sound(scene: Scene) -> None:
    store = FeatureStore.open(scene.store)
    assert store.available().all()
    assert store.verify().sound
    assert store.summary().complete


def test_running_again_does_nothing_and_says_so(scene: Scene, said: Said) -> None:
    before = tree_digest(scene.store)
    status, output, errors = said("extract", scene.table, scene.store, "--teachers", scene.teachers)
    assert status == 0, errors
    assert "0 shards to do" in output
    assert tree_digest(scene.store) == before


@pytest.mark.slow
def test_kill_9_and_run_again_gives_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ["extract", scene.table, store, "--teachers", scene.teachers, "--workers", 1]
    process = subprocess.Popen(
        [*MMKD, *map(str, command)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while entries(store) < 2:
        assert time.monotonic() < deadline, "no shard was finished in two minutes"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)  # the client, the scheduler inside it, and the workers
    process.wait()
    finished = entries(store)
    assert 2 <= finished < 8, "the kill came too late to prove anything"

    done = mmkd(*command)
    assert done.returncode == 0, done.stderr
    assert f"{8 - finished} shards to do" in done.stdout
    assert tree_digest(store) == tree_digest(scene.store)


@pytest.mark.parametrize("moment", [pytest.param("shards to do", marks=pytest.mark.slow), "dashboard"])
def test_ctrl_c_ends_without_tracebacks_and_leaves_no_process(scene: Scene, tmp_path: Path, moment: str) -> None:
    command = ["extract", scene.table, tmp_path / "store", "--teachers", scene.teachers, "--workers", 2]
    process = subprocess.Popen(
        [*MMKD[:1], "-u", *MMKD[1:], *map(str, command)],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while moment not in process.stdout.readline():
        assert process.poll() is None, "the run ended before it could be interrupted"
    time.sleep(0.5)  # the worker processes have begun to import, or to load teachers
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the client and all processes that it started
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    # While workers are being started Python may add that semaphores were left to its tracker, which frees them.
    assert said.startswith("Stopped; what was finished is kept: run the same command again to continue\n"), said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 3, said
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the interrupted run lives on")


@pytest.mark.slow
def test_a_disk_that_fills_ends_in_one_line_and_loses_nothing(scene: Scene, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ["extract", scene.table, store, "--teachers", scene.teachers, "--workers", 1]
    # A limit on file size stands for a full disk: chunks of 256 x 1024 x 2 + 4 bytes no longer fit, the index does.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500000, 500000)); "
    script = limit + "from mmkd.cli.main import main; main()"
    full = subprocess.run(
        [sys.executable, "-P", "-c", script, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert full.returncode == 1
    errors = [line for line in full.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, full.stderr
    assert "cannot write" in errors[0]
    assert "Traceback" not in full.stderr
    assert FeatureStore.open(store).ledger == {}
    done = mmkd(*command)
    assert done.returncode == 0, done.stderr
    assert tree_digest(store) == tree_digest(scene.store)


def test_a_teacher_without_weights_is_one_line(scene: Scene, tmp_path: Path, said: Said) -> None:
    folder = write_tiny_teacher(tmp_path / "bare", seed=1)
    (folder / "open_clip_model.safetensors").unlink()
    status, _, errors = said("extract", scene.table, tmp_path / "s", "--teachers", f"bare=local-dir:{folder}")
    assert status == 1
    assert errors.count("\n") == 1
    assert errors.startswith("Error: ")
    assert str(folder) in errors
    assert not (tmp_path / "s").exists()


def test_a_store_of_other_weights_is_refused_and_left_alone(scene: Scene, tmp_path: Path, said: Said) -> None:
    other = write_tiny_teacher(tmp_path / "other", seed=9)
    before = tree_digest(scene.store)
    status, _, errors = said("extract", scene.table, scene.store, "--teachers", f"tiny=local-dir:{other}")
    assert status == 1
    assert "weights, preprocessing or tokenizer differ" in errors
    assert errors.count("\n") == 1
    assert tree_digest(scene.store) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "nowhere.csv", "s", "--teachers", "t=local-dir:x"], "nowhere.csv does not exist"),
        (
            ["extract", "{table}", "s", "--scheduler", "tcp://127.0.0.1:1", "--teachers", "{teacher}"],
            "no Dask scheduler",
        ),
        (["store", "info", "nowhere"], "nowhere is not an mmkd store: it does not exist"),
        (["distill", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["export", "nowhere", "out"], "nowhere is not a run folder"),
    ],
)
def test_mistakes_end_in_one_line(
    scene: Scene, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    client = cluster._client_of
    at_once = {"timeout": "1s"}  # else ten
    monkeypatch.setattr(cluster, "_client_of", lambda address, **options: client(address, **options | at_once))
    status, output, errors = said(*(a.format(table=scene.table, teacher=scene.teachers) for a in arguments))
    assert status == 1, output
    assert message in errors
    assert errors.count("\n") == 1, errors


def test_a_process_says_what_the_command_line_says_in_this_one(tmp_path: Path, said: Said) -> None:
    done = mmkd("store", "info", tmp_path / "nowhere")
    assert (done.returncode, done.stdout, done.stderr) == said("store", "info", tmp_path / "nowhere")
    assert done.returncode == 1


def test_a_pickle_is_opened_only_when_told_and_another_architecture_is_one_line(
    scene: Scene, tmp_path: Path, said: Said
) -> None:
    import numpy as np
    import torch

    torch.save({"state_dict": {"a": torch.zeros(2)}, "loss": np.float64(1.5)}, tmp_path / "w.pt")
    card = tmp_path / "odd.yaml"
    card.write_text("slug: odd\nsource: local-dir:.\nweights: [w.pt]\noptions: {architecture: ViT-B-32}\n")
    status, _, errors = said("extract", scene.table, tmp_path / "s", "--teachers", card)
    assert status == 1
    assert "trust_pickle: true" in errors
    assert errors.count("\n") == 1
    card.write_text(card.read_text() + "trust_pickle: true\n")
    status, _, errors = said("extract", scene.table, tmp_path / "s", "--teachers", card, "--workers", 1)
    assert status == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("Error:")]
    assert "visual.conv1.weight" in line  # the architecture's own keys, which the file does not have
    assert "Traceback" not in errors
