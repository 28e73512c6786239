"""Tiny copies of teachers that are plain CLIPs: open_clip folders, transformers' CLIPModel, OpenAI's own keys."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from tests.plain_towers import State, openai_keys, plain_text, plain_vit, quick_gelu
from tests.teacher_parts import (
    DIM,
    NATIVE,
    OPENAI,
    Snapshot,
    loud,
    native_snapshot,
    native_state,
    register,
    spec_of,
    write_clip_tokenizer,
)


def quiltnet(folder: Path) -> Snapshot:
    """An open_clip folder whose configuration does not mention quick_gelu: plain GELU."""
    sd = native_state(11)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": NATIVE, "preprocess_cfg": OPENAI}))
    torch.save(sd, folder / "open_clip_pytorch_model.bin")
    return native_snapshot(spec_of("quiltnet", folder, "open_clip"), sd, F.gelu)


def genmedclip(folder: Path) -> Snapshot:
    """The same as safetensors."""
    sd = native_state(12)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": NATIVE, "preprocess_cfg": OPENAI}))
    save_file({k: v.contiguous() for k, v in sd.items()}, folder / "open_clip_model.safetensors")
    return native_snapshot(spec_of("genmedclip", folder, "open_clip"), sd, F.gelu)


def _clip_model(folder: Path, seed: int) -> State:
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 516,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "eos_token_id": 2,
            "bos_token_id": 514,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "hidden_act": "quick_gelu",
        },
        projection_dim=DIM,
    )
    state = dict(loud(transformers.CLIPModel(config), seed).state_dict())
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    write_clip_tokenizer(folder)
    return state


def _transformers_snapshot(slug: str, folder: Path, hf: State) -> Snapshot:
    sd = openai_keys(hf)
    return Snapshot(
        spec_of(slug, folder, "transformers"),
        lambda image: plain_vit(sd, image, 2, quick_gelu),
        lambda tokens: plain_text(sd, tokens, 4, quick_gelu),
    )


def plip(folder: Path) -> Snapshot:
    """A transformers CLIPModel of the first days: position_ids among the weights, a CLIPFeatureExtractor's settings."""
    hf = _clip_model(folder, 13)
    buffers = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    torch.save(hf | buffers, folder / "pytorch_model.bin")
    old = {"size": 32, "crop_size": 32, "resample": 3, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            old
            | {
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": OPENAI["mean"],
                "image_std": OPENAI["std"],
            }
        )
    )
    return _transformers_snapshot("plip", folder, hf)


def pubmedclip(folder: Path) -> Snapshot:
    """The same with today's preprocessor_config.json."""
    hf = _clip_model(folder, 14)
    torch.save(hf, folder / "pytorch_model.bin")
    new = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "do_center_crop": True,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(new | {"image_mean": OPENAI["mean"], "image_std": OPENAI["std"]})
    )
    return _transformers_snapshot("pubmedclip", folder, hf)


def pubmedclip_original(folder: Path) -> Snapshot:
    """The authors' own file: OpenAI's keys, weights in half precision, optimizer beside."""
    sd = {k: v.half().float() for k, v in native_state(15).items()}
    register(folder, "tiny-clip-quickgelu", quick_gelu=True)
    half = {k: v.half() if v.ndim >= 2 else v for k, v in sd.items()}
    torch.save(
        {"best_epoch": 4, "state_dict": half, "optimizer_state_dict": {}, "best_loss": 0.5},
        folder / "PubMedCLIP_ViT32.pth",
    )
    spec = spec_of(
        "pubmedclip-original",
        folder,
        "open_clip",
        weights=("PubMedCLIP_ViT32.pth",),
        options={"architecture": "tiny-clip-quickgelu"},
    )
    return native_snapshot(spec, sd, quick_gelu)
