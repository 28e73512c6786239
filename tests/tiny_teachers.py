"""Small open_clip folders with random weights, scaled so that different inputs give clearly different features."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_tiny_teacher(folder: Path, seed: int, embed_dim: int = 24, image_size: int = 32) -> Path:
    """Save a tiny native open_clip model; `seed` decides its weights."""
    folder.mkdir(parents=True)
    config = TINY | {"embed_dim": embed_dim, "vision_cfg": TINY["vision_cfg"] | {"image_size": image_size}}
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    # CLIP starts so small that all captions look alike; trained weights do not: unit gain everywhere.
    weights = {name: _unit_gain(name, value.detach()) for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def _unit_gain(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.ndim < 2:
        return value
    fan_in = 1 if "embedding" in name else value[0].numel() if "proj" not in name or "_proj" in name else value.shape[0]
    return torch.randn(value.shape) * fan_in**-0.5
