"""A run's student leaves as an open_clip folder: equal features, provenance, a teacher of the next generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from test_extract import load, run
from tiny_run import quiet, write_run

from mmkd.distill.checkpoint import best_or_last, read, student_weights
from mmkd.distill.config import RunConfig, load_run
from mmkd.distill.export import export
from mmkd.distill.student import Towers, build_student, plain_pixels
from mmkd.store.errors import UserError


@pytest.fixture(scope="module")
def finished(scene: Path) -> RunConfig:
    """A run that was judged and averaged."""
    monitor = {"sets": [{"name": "held-out", "where": {"site": "s1"}}], "every_steps": 4}
    config = load_run(write_run(scene, "to-export", monitor=monitor, optimiser={"average": 0.5}))
    quiet(config)
    return config


@pytest.fixture(scope="module")
def folder(finished: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its student."""
    return export(finished.out, tmp_path_factory.mktemp("export") / "student")


def test_open_clip_gives_the_features_of_the_trainer(finished: RunConfig, folder: Path, scene: Path) -> None:
    exported, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    student = build_student(finished.student)
    student.load_state_dict(student_weights(read(best_or_last(finished.out))[1]))
    towers = Towers(student).eval()
    exported.eval()
    pictures = [Image.open(scene / f"corpus/images/{i}.png") for i in range(5)]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["finding 3 seen in plane 2", "nothing"])
    with torch.no_grad():
        image = exported.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
        ours = towers.encode_images(torch.stack([plain_pixels(student)(picture) for picture in pictures]))
        assert torch.allclose(image, ours, atol=1e-5)
        assert (image[0] - image[1]).abs().max() > 1e-3
        assert torch.allclose(exported.encode_text(tokens), towers.encode_tokens(tokens), atol=1e-5)


def test_it_is_a_teacher_of_the_next_generation(folder: Path, scene: Path, tmp_path: Path) -> None:
    store = run(scene / "corpus/pairs.csv", tmp_path / "features", load({"student": folder}, "student"))
    exported, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        expected = exported.eval().encode_image(preprocess(Image.open(scene / "corpus/images/7.png"))[None])[0].numpy()
    assert np.allclose(store.image("student")[7], expected, atol=2e-3 * np.abs(expected).max())
    shutil.copy(scene / "tiny-student.json", tmp_path)
    report = quiet(write_run(tmp_path, "second-generation", epochs=1))
    assert report.steps == 4
    card = export(tmp_path / "runs/second-generation", tmp_path / "grandchild") / "README.md"
    assert f"| student | local-dir:{folder} |" in card.read_text()


def test_the_card_says_where_the_student_comes_from(finished: RunConfig, folder: Path) -> None:
    card, facts = (folder / "README.md").read_text(), json.loads((folder / "mmkd_run.json").read_text())
    _, state = read(best_or_last(finished.out))
    assert facts["best_step"] == state.progress.step == facts["steps"]
    assert f"Best score on held-out rows during training: {state.progress.best_score:.4f}" in card
    assert [teacher["slug"] for teacher in facts["teachers"]] == ["one", "two"]
    for teacher in facts["teachers"]:
        assert f"| {teacher['slug']} | {teacher['source']} | {teacher['digest']} | not stated |" in card
    assert "weights averaged with decay 0.5" in card
    assert "rows used: {'site': 's0'}" in card
    places = {"store": finished.store, "out": finished.out}
    assert RunConfig.model_validate(facts["config"] | places) == finished


def test_what_cannot_be_exported_is_said(finished: RunConfig, scene: Path, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: no run\.json"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        export(finished.out, folder)
    (tmp_path / "run.json").write_text(finished.model_dump_json())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export(tmp_path, tmp_path / "out")
