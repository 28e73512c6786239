"""Preprocessing and tokenizer go with the weights: from a tag over two stages and a resumption into open_clip's
hands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_run import in_ranks, quiet, stopped_at_first_step, write_run
from tiny_teachers import TINY
from tiny_text import write_bert, write_tokens

from mmkd.base.errors import ConfigError
from mmkd.distill.checkpoint import find_checkpoint, read, student_weights
from mmkd.distill.config import StudentConfig, load_run
from mmkd.distill.export import export
from mmkd.distill.prepare import prepare
from mmkd.distill.student import Towers, build_student, student_pixels, student_tokenizer
from mmkd.distill.world import World

LAST = {"hf_tokenizer_name": "tokens", "no_causal_mask": True, "pool_type": "last"}
TAGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mobileclip": ("MobileCLIP-S1", "datacompdr", {"no_causal_mask": True}),
    "siglip": ("ViT-B-16-SigLIP", "webli", LAST | {"tokenizer_kwargs": {"clean": "canonicalize"}}),
    "clipa": ("ViT-L-14-CLIPA", "datacomp1b", LAST | {"tokenizer_kwargs": {"strip_sep_token": True}}),
}
"""Architecture and tag whose preprocessing is taken, and the text tower of a tiny variant of it."""


def scene(training_scene: Path, root: Path, name: str, text: dict[str, Any]) -> Path:
    """A project beside the shared one, with a tiny student of this text tower."""
    for folder in ("features", "corpus"):
        (root / folder).symlink_to(training_scene / folder)
    write_tokens(root / "tokens")
    size = {"vocab_size": 64} if "hf_tokenizer_name" in text else {}
    config = TINY | {"embed_dim": 20, "text_cfg": TINY["text_cfg"] | {"width": 16} | size | text}
    (root / f"{name}.json").write_text(json.dumps(config))
    return root


@pytest.mark.integration
@pytest.mark.parametrize("name", TAGS)
def test_a_tags_preprocessing_goes_through_both_stages_into_open_clip(
    training_scene: Path, tmp_path: Path, name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tag, text = TAGS[name]
    facts = open_clip.get_pretrained_cfg(model, tag)
    root = scene(training_scene, tmp_path, name, text)
    torch.manual_seed(3)
    released = build_student(StudentConfig(model=str(root / f"{name}.json")))
    save_file(released.state_dict(), root / "released.safetensors")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: facts)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_: str(root / "released.safetensors"))
    student = {"model": f"{name}.json"}
    tagged = student | {"pretrained": tag}
    in_ranks(ranks, write_run(root, "stage1", preset="pretrain", epochs=1, student=tagged))
    path = write_run(root, "stage2", epochs=1, student=student | {"start_from": "runs/stage1"})
    in_ranks(ranks, path, stopped_at_first_step)
    assert (report := in_ranks(ranks, path)).resumed_at == 1
    assert report.steps == 4
    folder = export(root / "runs/stage2", root / "student")
    monkeypatch.undo()
    written = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    for key in ("mean", "std", "interpolation", "resize_mode"):
        wanted = list(facts[key]) if isinstance(facts[key], tuple) else facts[key]
        assert written[key] == wanted
    exported, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    mine = build_student(load_run(path).student, first_weights=False)
    for stage in ("stage1", "stage2"):
        record = read(find_checkpoint(root / "runs" / stage)).record
        assert all(record.preprocess[key] == written[key] for key in written)
    mine.visual.preprocess_cfg = record.preprocess
    mine.load_state_dict(student_weights(read(find_checkpoint(root / "runs/stage2"))))
    towers, picture = Towers(mine).eval(), Image.open(root / "corpus/images/4.png")
    captions = ["finding 3 seen in plane 4", "finding 30"]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    assert torch.equal(tokens, student_tokenizer(str(root / f"{name}.json"))(captions))
    with torch.no_grad():
        theirs = exported.eval().encode_image(transform(picture)[None])
        assert torch.allclose(towers.encode_images(student_pixels(mine)(picture)[None]), theirs, atol=1e-5)
        assert torch.allclose(towers.encode_tokens(tokens), exported.encode_text(tokens), atol=1e-5)


@pytest.fixture(scope="module")
def of_transformers(training_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run whose text tower is a folder of the machine, named by its absolute path."""
    root = tmp_path_factory.mktemp("of-transformers")
    bert = str(write_bert(root / "bert"))
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "hf_pooler_type": "cls_pooler", "hf_proj_type": "mlp"}
    scene(training_scene, root, "bert-student", {})
    config = TINY | {"embed_dim": 20, "text_cfg": text | {"context_length": 16}}
    (root / "bert-student.json").write_text(json.dumps(config))
    quiet(write_run(root, "run", epochs=1, student={"model": "bert-student.json"}))
    export(root / "runs/run", root / "exported")
    return root


def test_the_card_loads_a_text_tower_of_transformers_from_anywhere(
    of_transformers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = (of_transformers / "exported").rename(tmp_path / "moved")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(of_transformers)
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace('folder = "student"', f"folder = {str(folder)!r}"), found)
    folder.rename(of_transformers / "exported")
    config = load_run(of_transformers / "run.yaml")
    mine = build_student(config.student, first_weights=False)
    mine.load_state_dict(student_weights(read(find_checkpoint(config.out))))
    captions = ["finding 3 seen in plane 4", "finding 30"]
    tokens = found["tokenizer"](captions)
    assert torch.equal(tokens, student_tokenizer(config.student.model)(captions))
    with torch.no_grad():
        assert torch.allclose(found["model"].encode_text(tokens), mine.eval().encode_text(tokens), atol=1e-5)


def test_no_path_of_the_machine_is_recorded(of_transformers: Path) -> None:
    record = read(find_checkpoint(of_transformers / "runs/run"), tensors=False).record
    assert record.network["text_cfg"]["hf_model_name"] == record.network["text_cfg"]["hf_tokenizer_name"] == "."
    assert len(record.text_files.split(",")) == 2
    home = str(of_transformers).encode()
    assert home not in record.model_dump_json().encode()  # which is what W&B gets
    for path in [*(of_transformers / "exported").rglob("*"), *(of_transformers / "runs/run").rglob("*.safetensors")]:
        assert path.is_dir() or home not in path.read_bytes(), path


def test_a_network_that_names_a_place_of_the_machine_is_refused(of_transformers: Path) -> None:
    vision = TINY["vision_cfg"] | {"timm_model_name": "local-dir:/home/someone/trunk"}
    (of_transformers / "local.json").write_text(json.dumps(TINY | {"vision_cfg": vision}))
    path = write_run(of_transformers, "local", student={"model": "local.json"})
    with pytest.raises(ConfigError, match=r"vision_cfg\.timm_model_name is .*, a path of this machine; name what timm"):
        prepare(load_run(path), World(torch.device("cpu")))
