"""Validation during training, the weights' average, early stop, and what is logged."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from in_process import load, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_corpus import png, write_table_corpus
from tiny_run import in_ranks, quiet, stopped_at_first_step, write_run
from tiny_teachers import write_tiny_teacher
from tqdm import tqdm

from mmkd.base.errors import ConfigError, UserError
from mmkd.cli.distill import distill
from mmkd.cli.main import cli
from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read, step_of, student_weights
from mmkd.distill.config import load_run
from mmkd.distill.logs import Lines, Terminal
from mmkd.distill.monitor import draw_evenly, positive_ranks
from mmkd.distill.optimizer import WeightAverage
from mmkd.distill.prepare import prepare
from mmkd.distill.world import World
from mmkd.store import FeatureStore

HELD_OUT = {"name": "held-out", "where": "site = 's1'", "limit": 40}


def loop_ranks(queries: np.ndarray, gallery: np.ndarray, groups: np.ndarray) -> list[int]:
    """The definition, in loops."""
    found = []
    for i in range(len(queries)):
        cosine = [float(queries[i] @ gallery[j]) for j in range(len(gallery))]
        best = max(c for j, c in enumerate(cosine) if groups[j] == groups[i])
        found.append(sum(c >= best for j, c in enumerate(cosine) if groups[j] != groups[i]))
    return found


def test_ranks_are_those_of_the_definition_and_ties_count_against() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (rng.normal(size=(30, 4)).astype(np.float32) for _ in range(2))
    groups = rng.integers(0, 12, 30)
    found = positive_ranks(torch.from_numpy(queries), torch.from_numpy(gallery), torch.from_numpy(groups))
    assert found.tolist() == loop_ranks(queries, gallery, groups)
    same = torch.ones(6, 3) / 3**0.5
    assert positive_ranks(same, same, torch.arange(6)).tolist() == [5] * 6  # a collapsed student scores nothing


def test_scores_are_those_of_the_weights_as_open_clip_would_give_them(training_scene: Path, ranks: int) -> None:
    path = write_run(training_scene, f"judged-{ranks}", monitor={"sets": [HELD_OUT], "every_steps": 3})
    report, config = in_ranks(ranks, path), load_run(path)
    again = prepare(config, World(torch.device("cpu")))
    assert again.monitor.scores() == report.scores
    assert set(report.scores) == {"held-out/recall@1", "held-out/recall@5"}
    held = again.monitor.sets[0]
    assert set(held.rows.places.rows.tolist()) < set(range(1, 300, 3))
    assert len(set(held.rows.places.rows.tolist())) == 40
    # By hand: open_clip's own evaluation transform and tower over the corpus' own files.
    from open_clip.transform import image_transform_v2
    from PIL import Image

    from mmkd.distill.student import preprocessing

    student = again.update.model.towers.student.eval()
    transform = image_transform_v2(preprocessing(student), is_train=False)
    rows = held.rows.places.rows.tolist()
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(training_scene / f"corpus/images/{row}.png")) for row in rows])
        image = torch.nn.functional.normalize(student.encode_image(pixels), dim=-1)
        texts = held.captions.tokens(held.rows.caption)
        text = torch.nn.functional.normalize(student.encode_text(texts), dim=-1)
    places = loop_ranks(image.numpy(), text.numpy(), held.rows.caption)
    places += loop_ranks(text.numpy(), image.numpy(), held.rows.caption)
    for k in (1, 5):
        assert report.scores[f"held-out/recall@{k}"] == pytest.approx(np.mean([place < k for place in places]))


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(training_scene: Path) -> None:
    # A learning rate of nearly nothing: the first validation is the best, the next two are no better.
    changes = {"sets": [HELD_OUT], "every_steps": 2, "patience": 2}
    config = load_run(
        write_run(training_scene, "patient", monitor=changes, optimizer={"lr": 1e-30}, checkpoints={"keep_last": 1})
    )
    done = CliRunner().invoke(distill, [str(training_scene / "patient.yaml")], catch_exceptions=False)
    assert "stopped by patience: nothing better since step 2" in done.stdout
    assert [step_of(path) for path in checkpoints(config.out)] == [2, 6]
    assert step_of(find_checkpoint(config.out)) == 2
    assert read(find_checkpoint(config.out)).progress.best_step == 2


def test_zero_shot_classes_are_read_from_prompts(tmp_path: Path, training_scene: Path, ranks: int) -> None:
    folder = tmp_path / "val"
    (folder / "images").mkdir(parents=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["key", "image", "caption", "class", "split"])
        for i in range(8):
            (folder / "images" / f"{i}.png").write_bytes(png(i))
            table.writerow([f"k{i}", f"images/{i}.png", f"picture {i}", f"c{i % 2}", "val"])
        for i in range(4):
            table.writerow([f"p{i}", "", f"prompt {i}", f"c{i % 2}", "prompt"])
    teacher = load({"one": write_tiny_teacher(tmp_path / "one", seed=1)}, "one")
    run(folder / "pairs.csv", tmp_path / "val-features", teacher)
    entry = {
        "name": "classes",
        "store": str(tmp_path / "val-features"),
        "where": "split = 'val'",
        "label": "class",
        "prompts": "split = 'prompt'",
    }
    path = write_run(training_scene, f"zero-shot-{ranks}", epochs=1, monitor={"sets": [entry]})
    report = in_ranks(ranks, path)
    ready = prepare(load_run(path), World(torch.device("cpu")))
    assert report.scores.keys() == {"classes/bacc"}
    held, monitor = ready.monitor.sets[0], ready.monitor
    ready.update.model.towers.eval()
    with torch.no_grad():
        images, prompts = monitor._encode_images(held).numpy(), monitor._encode_texts(held.prompts).numpy()  # type: ignore[arg-type]
    vectors = [prompts[i::2].mean(axis=0) for i in range(2)]
    vectors = [vector / np.linalg.norm(vector) for vector in vectors]
    right = [int(np.argmax([image @ vector for vector in vectors])) == i % 2 for i, image in enumerate(images)]
    assert report.scores["classes/bacc"] == pytest.approx((np.mean(right[::2]) + np.mean(right[1::2])) / 2)
    few = entry | {"prompts": "split = 'prompt' and class = 'c0'"}
    with pytest.raises(UserError, match="no prompt for class 'c1'; its prompts name c0"):
        quiet(write_run(training_scene, "few-prompts", monitor={"sets": [few]}))


@pytest.mark.parametrize(
    ("monitor", "error", "message"),
    [
        ({"sets": [HELD_OUT | {"role": "report"}]}, ConfigError, "a `report` set must not be seen during training"),
        ({"sets": [HELD_OUT | {"where": "site = 's0'"}]}, ConfigError, r"row \d+ and 39 more are trained on too"),
        ({"sets": [HELD_OUT | {"where": "site = 's9'"}]}, UserError, "0 rows of .* match"),
        ({"sets": [HELD_OUT | {"where": ""}]}, ConfigError, "where"),
        ({"sets": [HELD_OUT | {"label": "site"}]}, ConfigError, "`label` and `prompts` go together"),
        ({"sets": [HELD_OUT, HELD_OUT]}, ConfigError, "two sets have one name"),
        ({"sets": [HELD_OUT], "metric": "x/y"}, ConfigError, "the sets give held-out/recall@1, held-out/recall@5"),
    ],
)
def test_mistakes_in_a_monitor(
    training_scene: Path, monitor: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        quiet(write_run(training_scene, "mistaken", monitor=monitor))
    assert "\n" not in str(caught.value)


def test_a_copy_of_the_store_is_known_by_its_content(training_scene: Path, tmp_path: Path) -> None:
    shutil.copytree(training_scene / "features", tmp_path / "copy")
    entry = HELD_OUT | {"store": str(tmp_path / "copy")}
    with pytest.raises(ConfigError, match=r"row \d+ and 39 more are trained on too"):
        prepare(
            load_run(write_run(training_scene, "copy", monitor={"sets": [entry | {"where": "site = 's0'"}]})),
            World(torch.device("cpu")),
        )
    prepare(load_run(write_run(training_scene, "copy2", monitor={"sets": [entry]})), World(torch.device("cpu")))


@pytest.mark.parametrize("change", ["pictures encoded again", "another precision", "imported features"])
def test_training_rows_in_other_bytes_are_known(
    training_scene: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their keys and captions, where the images have other bytes or none."""
    other = tmp_path / "other"
    if change == "pictures encoded again":
        table = write_table_corpus(tmp_path / "corpus", 30)
        for path in (tmp_path / "corpus/images").iterdir():
            Image.open(path).save(path, compress_level=0)
        run(table, other, load({"one": training_scene / "one"}, "one"))
    else:
        encoding = "int8" if change == "another precision" else "float32"
        arguments = ["store", "subset", str(training_scene / "features"), str(other), "--encoding", encoding]
        arguments += ["--allow-loss", "selections"]
        assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    sample_table = FeatureStore.sample_table

    def without_images(store: FeatureStore, *args: Any, **options: Any) -> pa.Table:
        found = sample_table(store, *args, **options)
        place = found.schema.get_field_index("image_sha256") if store.root == other else -1
        return found if place < 0 else found.set_column(place, "image_sha256", pa.nulls(len(found), pa.string()))

    if change == "imported features":
        monkeypatch.setattr(FeatureStore, "sample_table", without_images)
    entry = HELD_OUT | {"store": str(other), "where": "site = 's0'"}
    path = write_run(training_scene, "other-bytes", monitor={"sets": [entry]})
    count = 9 if change == "pictures encoded again" else 39
    with pytest.raises(ConfigError, match=rf"row \d+ and {count} more are trained on too .*or key, of a training row"):
        prepare(load_run(path), World(torch.device("cpu")))


def classes_judged(entry: dict[str, Any], root: Path) -> tuple[list[str], dict[str, float]]:
    """Classes of a zero-shot set's rows, and its scores by an untrained student."""
    run = prepare(load_run(write_run(root, "classes-judged", monitor={"sets": [entry]})), World(torch.device("cpu")))
    return run.monitor.sets[0].rows.labels, run.monitor.scores()


def test_classes_of_a_zero_shot_set(training_scene: Path) -> None:
    """Of any type of column; all classes are judged, and there are two at least."""
    entry = {"name": "by", "where": "site = 's1'", "label": "height", "prompts": "site = 's0'", "limit": 6}
    with pytest.raises(UserError, match="prompts name the one class '48', expected two or more"):
        classes_judged(entry, training_scene)
    labels, scores = classes_judged(entry | {"label": "row", "prompts": "site = 's1'", "limit": 100}, training_scene)
    assert labels == [str(row) for row in range(1, 300, 3)]
    assert scores.keys() == {"by/bacc"}
    with pytest.raises(UserError, match="set 'by': limit 99 is less than its 100 classes; raise it"):
        classes_judged(entry | {"label": "row", "prompts": "site = 's1'", "limit": 99}, training_scene)
    with pytest.raises(UserError, match="set 'by': 100 of its rows have no reason; leave them out"):
        classes_judged(entry | {"label": "reason"}, training_scene)


@pytest.mark.parametrize("limit", [5, 20, 24, 60, 500])
def test_a_limit_draws_from_all_classes_alike(limit: int) -> None:
    # Sorted by class, as stores are: 24 classes, the first with a single row.
    classes: list[str | None] = ["c00", *(f"c{k:02}" for k in range(1, 24) for _ in range(10))]
    places = draw_evenly(classes, limit)
    assert places.tolist() == sorted(set(places.tolist()))
    counts = Counter(classes[place] for place in places)
    assert len(places) == min(limit, 231)
    assert len(counts) == min(limit, 24)
    large = [count for name, count in counts.items() if name != "c00"]
    assert max(large) - min(large) <= 1
    assert np.array_equal(places, draw_evenly(classes, limit))


def test_a_limit_draws_rows_at_random_where_there_are_no_classes() -> None:
    places = draw_evenly([None] * 1000, 100)
    assert places.max() > 900
    assert abs(places.mean() - 500) < 100


def test_the_average_follows_its_definition_and_is_what_is_exported(training_scene: Path) -> None:
    layer = torch.nn.Linear(2, 1)
    average = WeightAverage(layer, 0.5)
    expected = layer.weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            layer.weight += 1
        average.update(layer, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    assert torch.allclose(average.values["weight"], expected)
    config = load_run(write_run(training_scene, "averaged", epochs=1, optimizer={"average": 0.9}))
    quiet(config)
    state = read(find_checkpoint(config.out))
    own, averaged = state.part("model.towers.student"), student_weights(state)
    assert own.keys() == averaged.keys()
    assert not torch.equal(own["visual.proj"], averaged["visual.proj"])


def test_tensorboard_holds_every_step_once_after_a_resume(
    training_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nobody has measured this machine's peak
    logging = {"tensorboard": True, "every_steps": 1}
    monitor = {"sets": [HELD_OUT], "every_steps": 2}
    changes = {"epochs": 1, "optimizer": {"warmup": 0.5}}
    path = write_run(training_scene, f"logged-{ranks}", **changes, logging=logging, monitor=monitor)
    in_ranks(ranks, path, stopped_at_first_step)
    in_ranks(ranks, path)
    events = EventAccumulator(str(load_run(path).out / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/task", "loss/feature", "loss/cross", "loss/total", "lr", "gradient_norm", "samples_per_second",
        "data_wait_share", "memory_gb", "tflops", "monitor/held-out/recall@1", "monitor/held-out/recall@5",
    }  # fmt: skip
    assert [event.step for event in events.Scalars("loss/total")] == [0, 1, 2, 3]
    assert [event.value for event in events.Scalars("lr")][:2] == pytest.approx([5e-4, 1e-3])


def test_the_bar_shows_terms_rates_waiting_and_memory() -> None:
    shown = io.StringIO()
    with tqdm(total=10, initial=3, file=shown, ncols=200, mininterval=0) as bar:
        Terminal(bar)(
            4,
            {"loss/task": 1.25, "loss/total": 2.5, "samples_per_second": 812.4, "data_wait_share": 0.034,
             "memory_gb": 1.26, "lr": 1e-3},
        )  # fmt: skip
    last = shown.getvalue().split("\r")[-1]
    assert "5/10" in last
    assert "task=1.250, total=2.500, samples/s=812, waiting=3%, GB=1.3" in last


def test_wandb_that_is_not_installed_is_said(training_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install .*\[wandb\]'"):
        quiet(write_run(training_scene, "no-wandb", logging={"wandb": "mine"}))


def test_wandb_without_a_login_is_one_line(training_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"logging.wandb failed \(No API key .*\); run `wandb login`, set") as caught:
        quiet(write_run(training_scene, "no-login", logging={"wandb": "mine"}))
    assert "\n" not in str(caught.value)


def log_records(path: Path) -> Iterator[bytes]:
    """Records of a W&B file: LevelDB's log format (blocks of 32 KiB; CRC, length, and type of each piece) behind
    a header of seven bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_offline_holds_every_step(training_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own service and its own file, without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = write_run(training_scene, "wandb", epochs=1, logging={"wandb": "mine", "every_steps": 1})
    report = quiet(path)
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = load_run(path).out.glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(data) for data in log_records(file)]
    (begun,) = [record.run for record in records if record.HasField("run")]
    note = (load_run(path).out / "wandb-id").read_text()
    assert (begun.project, begun.run_id, begun.display_name) == ("mine", note, "wandb")
    assert len(note) == 8
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert (config["config"]["batch_size"], config["model"]) == (24, "tiny-student")
    assert str(training_scene).encode() not in file.read_bytes()
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    for name, value in report.losses.items():
        assert rows[-1][f"loss/{name}"] == pytest.approx(value)
    assert rows[1]["lr"] == pytest.approx(1e-3)
    assert {"samples_per_second", "data_wait_share", "memory_gb", "gradient_norm"} <= rows[0].keys()


def test_a_log_without_a_terminal_gets_a_line_a_minute_and_every_validation(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 59.0, 60.0, 61.0])
    lines = Lines(2000, now=lambda: next(clock))
    rates = {"samples_per_second": 812.4, "data_wait_share": 0.031, "memory_gb": 1.24, "lr": 1e-3}
    lines(0, {"loss/task": 4.1, "loss/total": 5.0} | rates)
    lines(9, {"loss/task": 4.0, "loss/total": 4.5})  # not a minute later
    lines(999, {"loss/task": 3.0, "loss/total": 3.5})
    lines(1999, {"monitor/held-out/recall@1": 0.25})
    assert capsys.readouterr().err.splitlines() == [
        "step 1 of 2,000: task 4.100, total 5.000, 812 samples/s, 3% waiting, 1.2 GB",
        "step 1,000 of 2,000: task 3.000, total 3.500",
        "step 2,000 of 2,000: held-out/recall@1 0.250",
    ]


def test_a_log_is_written_where_stderr_is_no_terminal(training_scene: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quiet(write_run(training_scene, "a-log", monitor={"every_steps": 4, "sets": [HELD_OUT]}))
    heads = [line.partition(":")[0] for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert heads == ["step 1 of 8", "step 4 of 8", "step 8 of 8"]


def test_rows_are_looked_at_before_a_network_is_built(training_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.distill.checkpoint.build_student", lambda _: pytest.fail("a network was built"))
    cases = {
        "0 rows of .* match site = 's9'": {"monitor": {"sets": [HELD_OUT | {"where": "site = 's9'"}]}},
        "no sample column 'sight'": {"monitor": {"sets": [HELD_OUT | {"where": "sight = 's1'"}]}},
        "fewer than one batch of 4096": {"batch_size": 4096},
        "no prompt for class": {"monitor": {"sets": [HELD_OUT | {"label": "site", "prompts": "site = 's0'"}]}},
    }
    for number, (message, changes) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            quiet(write_run(training_scene, f"early{number}", **changes))
