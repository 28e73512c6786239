"""A run's student leaves as an open_clip folder: equal features, provenance, a teacher of the next generation."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from in_process import load, run
from PIL import Image
from safetensors.torch import load_file
from tiny_run import quiet, write_run

from mmkd.base.errors import UserError
from mmkd.cli.export import export as export_command
from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read, step_of, student_weights
from mmkd.distill.config import RunConfig, load_run
from mmkd.distill.export import export, write_graphs
from mmkd.distill.provenance import store_digest
from mmkd.distill.student import Towers, build_student, student_pixels
from mmkd.store import FeatureStore
from mmkd.store.selection import SelectionRule, read_selection, select


@pytest.fixture(scope="module")
def finished(training_scene: Path) -> RunConfig:
    """A run over a selection that was judged and averaged."""
    rule = SelectionRule.model_validate({"keep": {"cosine": {"at_least": -0.9}}})
    select(FeatureStore.open(training_scene / "features"), "agreed", rule)
    monitor = {"sets": [{"name": "held-out", "where": "site = 's1'"}], "every_steps": 4}
    averaged = {"average": 0.5}
    config = load_run(write_run(training_scene, "to-export", selection="agreed", monitor=monitor, optimizer=averaged))
    quiet(config)
    return config


@pytest.fixture(scope="module")
def folder(finished: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its student."""
    return export(finished.out, tmp_path_factory.mktemp("export") / "student")


def test_open_clip_gives_the_features_of_the_trainer(finished: RunConfig, folder: Path, training_scene: Path) -> None:
    exported, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    student = build_student(finished.student)
    student.load_state_dict(student_weights(read(find_checkpoint(finished.out))))
    towers = Towers(student).eval()
    exported.eval()
    pictures = [Image.open(training_scene / f"corpus/images/{i}.png") for i in range(5)]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["finding 3 seen in plane 2", "nothing"])
    with torch.no_grad():
        image = exported.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
        ours = towers.encode_images(torch.stack([student_pixels(student)(picture) for picture in pictures]))
        assert torch.allclose(image, ours, atol=1e-5)
        assert (image[0] - image[1]).abs().max() > 1e-3
        assert torch.allclose(exported.encode_text(tokens), towers.encode_tokens(tokens), atol=1e-5)


def test_it_is_a_teacher_of_the_next_generation(folder: Path, training_scene: Path, tmp_path: Path) -> None:
    store = run(training_scene / "corpus/pairs.csv", tmp_path / "features", load({"student": folder}, "student"))
    exported, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        expected = (
            exported.eval()
            .encode_image(preprocess(Image.open(training_scene / "corpus/images/7.png"))[None])[0]
            .numpy()
        )
    assert np.allclose(store.image("student")[7], expected, atol=2e-3 * np.abs(expected).max())
    shutil.copy(training_scene / "tiny-student.json", tmp_path)
    report = quiet(write_run(tmp_path, "second-generation", epochs=1))
    assert report.steps == 4
    card = export(tmp_path / "runs/second-generation", tmp_path / "grandchild") / "README.md"
    assert f"| student | local-dir:{folder.name} |" in card.read_text()


def test_the_card_says_where_the_student_comes_from(finished: RunConfig, folder: Path) -> None:
    card, facts = (folder / "README.md").read_text(), json.loads((folder / "mmkd_run.json").read_text())
    state = read(find_checkpoint(finished.out))
    assert facts["best_step"] == state.progress.step == facts["steps"]
    assert facts["scores"] == state.progress.best_scores
    assert set(facts["scores"]) == {"held-out/recall@1", "held-out/recall@5"}
    for name, score in facts["scores"].items():
        assert f"| {name} | {score:.4f} |" in card
    store = FeatureStore.open(finished.store)
    assert facts["source"]["store_digest"] == store_digest(store, ("one", "two"))
    assert (
        f"store digest {facts['source']['store_digest'][:16]}, corpus digest {store.record.corpus.digest[:16]}" in card
    )
    assert facts["config"]["selection"] == "agreed"
    assert facts["source"]["selection"] == read_selection(store, "agreed").card.digest
    assert f"selection `agreed` (digest {facts['source']['selection'][:16]})" in card
    assert [teacher["slug"] for teacher in facts["source"]["teachers"]] == ["one", "two"]
    for teacher in facts["source"]["teachers"]:
        assert f"| {teacher['slug']} | {teacher['source']} | {teacher['digest']} | not stated |" in card
    assert "weights averaged with decay 0.5" in card
    assert "rows used: site = 's0'" in card
    assert facts["config"] == state.record.config
    assert (facts["config"]["seed"], facts["config"]["optimizer"]["average"]) == (finished.seed, 0.5)


def test_nothing_but_the_checkpoints_is_needed_and_no_path_is_said(
    finished: RunConfig, folder: Path, training_scene: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.out / "checkpoints", tmp_path / "run/checkpoints")
    model = training_scene / "tiny-student.json"
    description = model.read_text()
    try:
        model.unlink()
        export(tmp_path / "run", tmp_path / "student")
    finally:
        model.write_text(description)
    for name in ("README.md", "mmkd_run.json", "open_clip_config.json", "open_clip_model.safetensors"):
        content = (tmp_path / "student" / name).read_bytes()
        assert content == (folder / name).read_bytes()
        assert str(training_scene).encode() not in content
    assert "tiny-student, " in (folder / "README.md").read_text()


def test_any_checkpoint_can_be_exported_and_its_card_is_about_it(finished: RunConfig, tmp_path: Path) -> None:
    steps = [step_of(path) for path in checkpoints(finished.out)]
    best = step_of(find_checkpoint(finished.out))
    assert steps == [4, 8]
    for which, step in (("last", 8), ("4", 4), ("8", 8), ("best", best)):
        done = CliRunner().invoke(
            export_command, [str(finished.out), str(tmp_path / which), "--checkpoint", which], catch_exceptions=False
        )
        assert done.exit_code == 0
        facts = json.loads((tmp_path / which / "mmkd_run.json").read_text())
        saved = read(finished.out / f"checkpoints/step-{step:08d}.safetensors")
        assert facts["steps"] == step
        assert facts["scores"] == (saved.progress.best_scores if saved.progress.best_step == step else {})
        card = (tmp_path / which / "README.md").read_text()
        assert f"{step} steps of 24 pairs" in card
        assert ("This is not the checkpoint that validation chose" in card) == (not facts["scores"])
        weights = load_file(tmp_path / which / "open_clip_model.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in student_weights(saved).items())
    with pytest.raises(UserError, match="has no checkpoint '5'; expected best, last or one of its steps: 4, 8"):
        export(finished.out, tmp_path / "none", checkpoint="5")


def graph_features(folder: Path, kind: str, tower: str, inputs: torch.Tensor) -> torch.Tensor:
    """As a program without open_clip would have them."""
    if kind == "torchscript":
        loaded: torch.Tensor = torch.jit.load(folder / kind / f"{tower}.pt")(inputs)
        return loaded
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / kind / f"{tower}.onnx")
    name = {"image": "pixels", "text": "tokens"}[tower]
    return torch.from_numpy(session.run(["features"], {name: inputs.numpy()})[0])


@pytest.mark.parametrize("kind", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_graphs_give_the_features_of_open_clip(
    finished: RunConfig, training_scene: Path, tmp_path: Path, kind: str
) -> None:
    done = CliRunner().invoke(
        export_command, [str(finished.out), str(tmp_path / "s"), "--graph", kind], catch_exceptions=False
    )
    exported, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 's'}")
    exported.eval()
    pictures = [Image.open(training_scene / f"corpus/images/{i}.png") for i in range(5)]
    inputs = {
        "image": torch.stack([preprocess(picture) for picture in pictures]),
        "text": open_clip.get_tokenizer(f"local-dir:{tmp_path / 's'}")(["finding 3 in plane 2", "nothing", "", "a b"]),
    }
    told = json.loads((tmp_path / "s/mmkd_run.json").read_text())[kind]
    with torch.no_grad():
        for tower, given in inputs.items():
            expected = exported.encode_image(given) if tower == "image" else exported.encode_text(given)
            found = graph_features(tmp_path / "s", kind, tower, given)
            assert (expected[0] - expected[1]).abs().max() > 1e-3
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), tower
            assert 0 <= told[tower] < 1e-5
    assert f"{tmp_path / 's' / kind}: image and text tower, " in done.stdout


class Forgetful(torch.nn.Module):
    """Its text tower reckons with the size of the batch: a graph keeps the size that it was traced with."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.float() * int(tokens.shape[0])


def test_a_graph_that_differs_from_the_student_is_deleted(tmp_path: Path) -> None:
    images, tokens = torch.randn(3, 3, 4, 4), torch.tensor([[3, 4], [5, 6], [7, 8]])
    with pytest.raises(UserError, match="the torchscript graph of the text tower differs from the student by 1 of"):
        write_graphs(Forgetful(), images, tokens, "torchscript", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["image.pt"]


def test_an_export_that_fails_leaves_nothing(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("another feature")

    monkeypatch.setattr("mmkd.distill.export.write_graphs", fail)
    (tmp_path / "s").mkdir()
    with pytest.raises(UserError, match="another feature"):
        export(finished.out, tmp_path / "s", ["torchscript"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "s"]


def test_onnx_without_its_packages_is_one_line(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"an ONNX graph needs the package 'onnxscript': pip install .*\[onnx\]'"):
        export(finished.out, tmp_path / "out", ["onnx"])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_said(
    finished: RunConfig, training_scene: Path, tmp_path: Path, folder: Path
) -> None:
    with pytest.raises(UserError, match="is not a run folder; name the `out`"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        export(finished.out, folder)
    shutil.copy(finished.out / "run.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export(tmp_path, tmp_path / "out")
