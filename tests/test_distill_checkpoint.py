"""Checkpoints: which are kept and found, whose they are, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_run import in_ranks, quiet, stopped_at_first_step, write_run

from mmkd.base.errors import BusyStoreError, ConfigError, CorruptStoreError, StoreError, UserError
from mmkd.distill.alignment.config import load_align
from mmkd.distill.alignment.fit import align as fit_alignment
from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read, step_of
from mmkd.distill.config import StudentConfig, load_run
from mmkd.distill.export import export
from mmkd.distill.prepare import prepare
from mmkd.distill.student import build_student
from mmkd.distill.world import World
from mmkd.store import FeatureStore

JUDGED = {"every_steps": 2, "sets": [{"name": "s1", "where": "site = 's1'", "limit": 30}]}


def test_only_the_last_checkpoints_and_the_best_are_kept(training_scene: Path, ranks: int) -> None:
    path = write_run(training_scene, f"kept-{ranks}", checkpoints={"every_steps": 2, "keep_last": 1})
    in_ranks(ranks, path)
    config = load_run(path)
    assert [step_of(path) for path in checkpoints(config.out)] == [8]
    assert step_of(find_checkpoint(config.out)) == 8


def test_a_checkpoint_of_another_run_is_refused(training_scene: Path, ranks: int) -> None:
    in_ranks(ranks, write_run(training_scene, f"other-{ranks}", epochs=1))
    with pytest.raises(UserError, match="another configuration or store") as caught:
        in_ranks(ranks, write_run(training_scene, f"other-{ranks}", epochs=1, seed=5, optimizer={"lr": 2e-3}))
    assert "\n" not in str(caught.value)
    assert "(seed was 0, is 5; optimizer.lr was 0.001, is 0.002); name another `out`" in str(caught.value)


def test_a_store_that_gained_a_teacher_is_another_run(training_scene: Path, tmp_path: Path) -> None:
    shutil.copytree(training_scene / "features", tmp_path / "features")
    shutil.copy(training_scene / "tiny-student.json", tmp_path)
    store = FeatureStore.open(tmp_path / "features")
    config = load_run(write_run(tmp_path, "grown", teachers=["one"], epochs=1))
    quiet(config)
    assert set(store.teachers) == {"one", "two"}
    with pytest.raises(UserError, match="another configuration or store"):
        quiet(write_run(tmp_path, "grown", epochs=1))


@pytest.mark.integration
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_there(training_scene: Path, ranks: int) -> None:
    path = write_run(training_scene, f"damaged-{ranks}", checkpoints={"every_steps": 4})
    in_ranks(ranks, path)
    earlier, last = checkpoints(load_run(path).out)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CorruptStoreError, match=r"is damaged .*; delete it to go on from the one before"):
        in_ranks(ranks, path)
    last.unlink()
    assert in_ranks(ranks, path).resumed_at == step_of(earlier) == 4


def test_a_loss_that_is_not_a_number_names_its_batch(training_scene: Path) -> None:
    config = load_run(write_run(training_scene, "nan", optimizer={"lr": 1e30, "warmup_steps": 0}))
    with pytest.raises(UserError, match=r"at step 1 \(epoch 0\), rows \d+, .*lower optimizer\.lr") as caught:
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


def test_a_kill_behind_a_checkpoint_leaves_it_the_best(training_scene: Path) -> None:
    """What is said of a run has no file of its own that a kill could keep from being written."""
    config = load_run(write_run(training_scene, "judged-best", monitor=JUDGED, checkpoints={"every_steps": 2}))
    quiet(config)
    best = find_checkpoint(config.out)
    state = read(best)
    assert state.progress.best_step == step_of(best) == state.progress.step
    for path in checkpoints(config.out):
        if step_of(path) > step_of(best):
            path.unlink()
    assert find_checkpoint(config.out) == best
    assert {path.name for path in config.out.iterdir()} <= {"checkpoints", "run.json", "tokens.safetensors", "tokens"}


def test_first_weights_are_those_of_the_checkpoint(training_scene: Path, tmp_path: Path, ranks: int) -> None:
    for name, seed in (("first-a", 1), ("first-b", 2)):
        in_ranks(ranks, write_run(training_scene, name, out=f"runs/{ranks}/{name}", epochs=1, seed=seed))
    start = {"model": "tiny-student.json", "start_from": f"runs/{ranks}/first-a"}
    path = write_run(training_scene, f"second-{ranks}", student=start)
    in_ranks(ranks, path, stopped_at_first_step)
    write_run(training_scene, f"second-{ranks}", student=start | {"start_from": f"runs/{ranks}/first-b"})
    with pytest.raises(UserError, match=r"another configuration or store .*first_weights was .*, is .* at step 4"):
        in_ranks(ranks, path)
    # The folder may go: its weights are in the checkpoint.
    write_run(training_scene, f"second-{ranks}", student=start)
    (training_scene / f"runs/{ranks}/first-a").rename(tmp_path / "first-a")
    assert in_ranks(ranks, path).resumed_at == 1
    card = export(load_run(path).out, tmp_path / "student") / "README.md"
    assert "It began with first-a." in card.read_text()
    with pytest.raises(UserError, match="first-a is not a run folder"):
        quiet(write_run(training_scene, "third", student=start))


def test_pretrained_is_relative_to_the_yaml_and_may_go(
    training_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("features", "corpus"):
        (tmp_path / name).symlink_to(training_scene / name)
    shutil.copy(training_scene / "tiny-student.json", tmp_path)
    clip = build_student(StudentConfig(model=str(tmp_path / "tiny-student.json")))
    (tmp_path / "weights").mkdir()
    for name in ("w.safetensors", "weights/w.safetensors"):
        save_file({key: value + len(name) * 1e-3 for key, value in clip.state_dict().items()}, tmp_path / name)
    monkeypatch.chdir(training_scene)
    student = {"model": "tiny-student.json", "pretrained": "w.safetensors"}
    path = write_run(tmp_path, "pre", student=student)
    ready = prepare(load_run(path), World(torch.device("cpu")))
    for name, value in ready.update.model.towers.student.state_dict().items():
        assert torch.equal(value, clip.state_dict()[name] + 13e-3), name
    stopped_at_first_step(path)
    write_run(tmp_path, "pre", student=student | {"pretrained": "weights/w.safetensors"})
    with pytest.raises(UserError, match="first_weights was"):
        quiet(path)
    (tmp_path / "w.safetensors").unlink()
    write_run(tmp_path, "pre", student=student)
    assert quiet(path).steps == 8
    card = export(tmp_path / "runs/pre", tmp_path / "student") / "README.md"
    assert "It began with w.safetensors." in card.read_text()
    with pytest.raises(ConfigError, match=r"cannot read .*w\.safetensors \(No such file"):
        quiet(write_run(tmp_path, "pre2", student=student))


def test_a_moved_project_goes_on_with_its_alignment(training_scene: Path, tmp_path: Path) -> None:
    align = {"out": "phi.safetensors", "method": {"pca": {}}, "dim": 20}
    for root in (training_scene, tmp_path):
        (root / "align.yaml").write_text(yaml.safe_dump(align))
    fit_alignment(FeatureStore.open(training_scene / "features"), load_align(training_scene / "align.yaml"))
    heads = {"alignment": "phi.safetensors"}
    stopped_at_first_step(write_run(training_scene, "aligned", heads=heads))
    for name in ("features", "tiny-student.json", "phi.safetensors", "runs/aligned"):
        copy = shutil.copytree if (training_scene / name).is_dir() else shutil.copy
        copy(training_scene / name, tmp_path / name)
    (tmp_path / "corpus").symlink_to(training_scene / "corpus")
    assert quiet(write_run(tmp_path, "aligned", heads=heads)).resumed_at == 1
    other = align | {"method": {"whitening": {}}}
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(other))
    fit_alignment(FeatureStore.open(tmp_path / "features"), load_align(tmp_path / "align.yaml"))
    with pytest.raises(UserError, match="alignment was"):
        quiet(write_run(tmp_path, "aligned", heads=heads))


def test_another_metric_or_other_rows_choose_a_best_of_their_own(training_scene: Path, ranks: int) -> None:
    sets = [JUDGED["sets"][0], {"name": "s2", "where": "site = 's2'", "limit": 6}]  # type: ignore[index]
    monitor = {"every_steps": 1, "sets": sets, "metric": "s2/recall@5"}
    path = write_run(training_scene, f"metrics-{ranks}", monitor=monitor)
    in_ranks(ranks, path, stopped_at_first_step)
    out = load_run(path).out
    assert read(checkpoints(out)[-1]).progress.judge.startswith("s2/recall@5 ")
    for changes in ({"metric": "s1/recall@1"}, {"metric": "s1/recall@1", "sets": [sets[0] | {"limit": 10}]}):  # type: ignore[operator]
        before = read(checkpoints(out)[-1]).progress
        write_run(training_scene, f"metrics-{ranks}", monitor=monitor | changes)
        in_ranks(ranks, path, stopped_at_first_step)
        after = read(checkpoints(out)[-1]).progress
        assert after.judge != before.judge
        assert (after.step, after.best_step, after.worse) == (before.step + 1, before.step + 1, 0)
        assert after.best_score == after.best_scores["s1/recall@1"]


def test_a_run_that_patience_ended_takes_no_more_steps(training_scene: Path, ranks: int) -> None:
    monitor = {"every_steps": 1, "patience": 2, "sets": JUDGED["sets"]}
    still = {"lr": 1e-9, "warmup_steps": 0}
    path = write_run(training_scene, f"ended-{ranks}", epochs=10, optimizer=still, monitor=monitor)
    first = in_ranks(ranks, path)
    assert (first.steps, first.stopped, first.best.best_step) == (3, "patience", 1)
    saved = checkpoints(load_run(path).out)
    again = in_ranks(ranks, path)
    assert (again.resumed_at, again.steps, again.stopped) == (3, 3, "patience")
    assert checkpoints(load_run(path).out) == saved


def test_a_run_deletes_what_killed_ones_left_but_not_what_others_fetch(training_scene: Path) -> None:
    ready = prepare(load_run(write_run(training_scene, "leftovers")), World(torch.device("cpu")))
    left = [ready.config.out / place / ".x.mmkd-tmp" for place in (".", "checkpoints", "cache")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    ready.begin()
    assert [path.exists() for path in left] == [False, False, True]


def test_the_window_is_part_of_a_run_that_has_windows(training_scene: Path) -> None:
    digests = [
        prepare(load_run(write_run(training_scene, "window", data=data)), World(torch.device("cpu"))).record.digest
        for data in ({}, {"window": 3}, {"order": "windows"}, {"order": "windows", "window": 3})
    ]
    assert [digests.index(digest) for digest in digests] == [0, 0, 2, 3]


def test_a_folder_has_one_run_at_a_time(training_scene: Path) -> None:
    path = write_run(training_scene, "two-at-once", epochs=200, data={"workers": 2})
    child = multiprocessing.get_context("fork").Process(target=quiet, args=(path,))
    child.start()
    while not (load_run(path).out / "run.json").exists():
        time.sleep(0.05)
    try:
        for ranks in (1, 2):
            with pytest.raises(BusyStoreError, match="two-at-once is being written by `mmkd distill`"):
                in_ranks(ranks, path)
    finally:
        child.kill()
        child.join()
    # The loader's processes outlive a killed run for a moment, and do not hold its folder.
    stopped_at_first_step(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"task": 0, "feature": 0, "cross": 0}}, "loss: every weight is 0"),
        ({"policy": {"kind": "weighted", "weights": {"one": 0, "two": 0}}}, "policy.weights is 0 for every teacher"),
        ({"data": {"workers": 0, "crop_scale": [1.0, 0.5]}}, r"crop_scale: is \[1.0, 0.5\], expected"),
        ({"data": {"workers": 0, "crop_scale": [0.0, 0.5]}}, "crop_scale: is"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "betas.1: Input should be less than 1"),
        ({"teachers": ["one", "one"]}, "teachers: one is named twice"),
        ({"where": "width = '40'"}, "column 'width' holds int32, compare it with a number"),
        ({"where": "site = 0"}, "column 'site' holds string, compare it with a text in single quotes"),
        (
            {"where": {"site": "s'1", "width": 40}},
            "where: is a mapping, expected a condition as text: \"site = 's''1' and width = 40\"",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(training_scene: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(load_run(write_run(training_scene, "cannot-work", **changes)), World(torch.device("cpu")))
    assert "\n" not in str(caught.value)
