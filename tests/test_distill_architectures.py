"""Every architecture of open_clip: small ones whole, all others with fewer and narrower layers."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from tiny_run import quiet, write_run, write_scene
from tiny_text import write_tokens
from transformers import M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read, student_weights
from mmkd.distill.config import load_run
from mmkd.distill.export import export
from mmkd.distill.student import Towers, build_student, model_config, student_pixels, student_tokenizer

LARGEST = 105e6
"""Parameters; a checkpoint takes 12 bytes of each."""
TEXTS = {"xlm-roberta": XLMRobertaConfig, "roberta": RobertaConfig, "mt5": MT5Config, "nllb": M2M100Config}
"""Families of text towers on the hub."""
TRUNKS = {
    "convnext": "convnext_atto",
    "eva_giant": "eva02_tiny_patch14_224",
    "eva02": "eva02_tiny_patch14_224",
    "fastvit": "fastvit_t8",
    "swin": "swin_tiny_patch4_window7_224",
    "vit_pe_core": "vit_pe_core_tiny_patch16_384",
    "vitamin": "vitamin_small_224",
    "vit": "vit_tiny_patch16_224",
}
"""Families of timm's image towers, each with a small member."""


@cache
def small(name: str) -> bool:
    """Whether a network needs no hub and is small, by its configuration where that suffices."""
    settings = model_config(name)
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if {"hf_model_name", "hf_tokenizer_name"} & set(text):
        return False
    parameters = [
        layers * 12 * part["width"] ** 2 + part.get("vocab_size", 0) * part["width"]
        for part in (vision, text)
        if isinstance(layers := part.get("layers"), int) and "width" in part
    ]
    if sum(parameters) >= LARGEST:
        return False
    with torch.device("meta"):
        network = open_clip.create_model(name, pretrained_text=False, device="meta")
    return sum(parameter.numel() for parameter in network.parameters()) < LARGEST


def miniature(name: str) -> dict[str, Any]:
    """The model config of `name` with small towers of the same kinds; `TEXT` and `TOKENS` stand for folders."""
    settings = deepcopy(model_config(name))
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    width = 64
    if trunk := vision.get("timm_model_name"):
        vision["timm_model_name"] = next(small for family, small in TRUNKS.items() if trunk.startswith(family))
        vision["image_size"] = 384 if "pe_core" in trunk else 224
        if vision.get("timm_proj") == "none":
            width = 192  # of ViT-Tiny: the trunk's own features are the embedding
    else:
        residual = isinstance(vision["layers"], list)
        vision |= {"layers": [1, 1, 1, 1], "width": 16} if residual else {"layers": 1, "width": 64}
        vision |= {"head_width": 32, "image_size": 64 if residual else 4 * vision["patch_size"]}
        if vision.get("attentional_pool"):
            vision["attn_pooler_heads"] = 2
    settings["embed_dim"] = width
    text |= {"width": width, "heads": 2, "layers": 1} if "hf_model_name" not in text else {"hf_model_name": "TEXT"}
    if "hf_tokenizer_name" in text:
        text |= {"hf_tokenizer_name": "TOKENS", "vocab_size": 64}
        text.setdefault("context_length", 77)
    if "multimodal_cfg" in settings:
        settings["multimodal_cfg"] |= {"width": width, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    return settings


def text_family(name: str) -> str:
    """Of the text tower on the hub; that of the tokenizer alone is any."""
    tower = model_config(name)["text_cfg"].get("hf_model_name", "roberta")
    return next(family for family in TEXTS if family in tower)


def distinct_miniatures() -> list[str]:
    """One architecture for each miniature."""
    names = {json.dumps([miniature(name), text_family(name)], sort_keys=True): name for name in open_clip.list_models()}
    return sorted(names.values())


def write_text(folder: Path, name: str) -> None:
    """A text tower of the kind that `name` has, two narrow layers of it, and a tokenizer of 64 words."""
    kind = TEXTS[text_family(name)]
    sizes = {"vocab_size": 64, "pad_token_id": 1, "max_position_embeddings": 96}
    if kind is MT5Config:
        kind(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=64, **sizes).save_pretrained(folder / "text")
    elif kind is M2M100Config:
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        kind(d_model=32, **heads, **layers, **sizes).save_pretrained(folder / "text")
    else:
        layers = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        kind(**layers, **sizes).save_pretrained(folder / "text")
    write_tokens(folder / "tokens")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of one site and two teachers."""
    return write_scene(tmp_path_factory.mktemp("architectures"), rows=12)


def check(tiny: Path, out: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps; the second again from the first's checkpoint; exported; open_clip's features are the trainer's."""
    settings = {"epochs": 1, "batch_size": 2, "checkpoints": {"every_steps": 1, "keep_last": 9}}
    config = load_run(write_run(tiny, out.name, student={"model": model}, out=str(out / "run"), **settings))
    assert quiet(config).steps == 2
    _, second = checkpoints(config.out)
    whole = student_weights(read(second))
    second.unlink()
    quiet(config)
    resumed = student_weights(read(find_checkpoint(config.out)))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    exported = export(config.out, out / "exported")
    for file in exported.glob("*.json"):
        assert str(tiny) not in file.read_text()
        assert str(out) not in file.read_text()
    mine = build_student(config.student, first_weights=False)
    mine.load_state_dict(resumed)
    towers = Towers(mine).eval()
    monkeypatch.chdir(exported)
    theirs, transform = open_clip.create_model_from_pretrained("local-dir:.")
    theirs.eval()
    picture, captions = Image.effect_noise((90, 90), 60).convert("RGB"), ["finding 3 seen in plane 4", "a knee"]
    with torch.no_grad():
        tokens = student_tokenizer(config.student.model)(captions)
        assert torch.equal(tokens, open_clip.get_tokenizer("local-dir:.")(captions))
        for ours, reference in (
            (towers.encode_images(student_pixels(mine)(picture)[None]), theirs.encode_image(transform(picture)[None])),
            (towers.encode_tokens(tokens), theirs.encode_text(tokens)),
        ):
            assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", open_clip.list_models())
def test_a_small_architecture_trains_resumes_and_is_exported(
    tiny: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small(name):
        pytest.skip("larger than a small machine takes, or in need of the hub")
    try:
        check(tiny, tmp_path, name, monkeypatch)
    finally:
        shutil.rmtree(tmp_path)  # gigabytes


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", distinct_miniatures())
def test_a_miniature_trains_resumes_and_is_exported(
    tiny: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path, name)
    config = json.dumps(miniature(name)).replace('"TEXT"', '"text"').replace('"TOKENS"', '"tokens"')
    (tmp_path / f"{name}.json").write_text(config)
    check(tiny, tmp_path, str(tmp_path / f"{name}.json"), monkeypatch)
