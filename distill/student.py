"""The student: an open_clip model from its own initialisation, and one linear head for each teacher."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from mmkd.distill.config import StudentConfig
from mmkd.store.errors import ConfigError

# CLIP's initial temperature, 1/0.07, as the logarithm that is learned (arXiv 2103.00020, section 2.5).
INITIAL_LOG_SCALE = 2.6592600


def model_config(model: str) -> dict[str, Any]:
    """The open_clip model config of a student.

    Raises:
        ConfigError: not a name that open_clip knows, nor a file with an open_clip model config.
    """
    if not model.endswith(".json"):
        config = open_clip.get_model_config(model)
        if config is None:
            raise ConfigError(
                f"student model {model!r} is unknown to open_clip; "
                "name one of open_clip.list_models() or a .json model config"
            )
        return dict(config)
    try:
        content = json.loads(Path(model).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"student model config {model} cannot be read: {error}") from error
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(content):
        raise ConfigError(f"{model} is not an open_clip model config: expected embed_dim, vision_cfg and text_cfg")
    return dict(content)


def _registered_name(model: str) -> str:
    """The name under which open_clip finds the config; a file is registered under its own name first."""
    model_config(model)
    if not model.endswith(".json"):
        return model
    open_clip.add_model_config(Path(model))
    return Path(model).stem


def build_student(config: StudentConfig) -> nn.Module:
    """Make the network: random weights unless `pretrained` names some.

    Raises:
        ConfigError: see `model_config`.
    """
    name = _registered_name(config.model)
    if config.pretrained:
        model: nn.Module = open_clip.create_model(name, pretrained=config.pretrained)
        return model
    # open_clip warns that no weights were loaded, which is what was asked for.
    logging.disable(logging.WARNING)
    try:
        model = open_clip.create_model(name)
    finally:
        logging.disable(logging.NOTSET)
    return model


def student_tokenizer(config: StudentConfig) -> Callable[[list[str]], torch.Tensor]:
    """The student's tokenizer: captions to int64 (n, L)."""
    name = _registered_name(config.model)
    tokenizer: Callable[[list[str]], torch.Tensor] = open_clip.get_tokenizer(name)
    return tokenizer


def train_transform(student: nn.Module, crop_scale: tuple[float, float]) -> Callable[[Image.Image], torch.Tensor]:
    """Random resized crop and normalisation, as open_clip trains."""
    preprocess = PreprocessCfg(**student.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    transform: Callable[[Image.Image], torch.Tensor] = image_transform_v2(
        preprocess, is_train=True, aug_cfg={"scale": crop_scale}
    )
    return transform


class Distilled(nn.Module):
    """Student, heads and temperatures: all that the optimiser sees.

    A head is one linear map from the student's width D to a teacher's width E, used for image and text
    alike: whatever aligns the two in the student then aligns them in every teacher's space.
    """

    def __init__(self, student: nn.Module, student_dim: int, teacher_dims: Sequence[int]) -> None:
        super().__init__()
        self.student = student
        self.heads = nn.ModuleList(nn.Linear(student_dim, dim, bias=False) for dim in teacher_dims)
        self.cross_log_scales = nn.Parameter(torch.full((len(teacher_dims),), INITIAL_LOG_SCALE))

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Student features (B, D) of images float32 (B, 3, H, W) and tokens int64 (B, L), as the towers give them."""
        return self.student.encode_image(images), self.student.encode_text(tokens)  # type: ignore[operator]

    @property
    def student_log_scale(self) -> torch.Tensor:
        """The student's temperature, as the logarithm that is learned."""
        log_scale: torch.Tensor = self.student.logit_scale  # type: ignore[assignment]
        return log_scale

    @property
    def scale(self) -> torch.Tensor:
        """exp of the student's temperature."""
        return self.student_log_scale.exp()
