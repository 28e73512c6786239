"""The student: an open_clip model, and the geometry and tokens that it wants."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import text_global_pool
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn
from torchvision.transforms import Compose, Normalize, PILToTensor, RandomResizedCrop, ToTensor

from mmkd.base.errors import ConfigError
from mmkd.distill.config import StudentConfig

Pixels = Callable[[Image.Image], torch.Tensor]
"""A picture to uint8 (3, H, W)."""


Tokenise = Callable[[list[str]], torch.Tensor]
"""Captions to int64 (n, L)."""


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


def student_tokenizer(config: StudentConfig) -> Tokenise:
    """The student's tokenizer: captions to int64 (n, L)."""
    name = _registered_name(config.model)
    tokenizer: Tokenise = open_clip.get_tokenizer(name)
    return tokenizer


def preprocessing(student: nn.Module) -> PreprocessCfg:
    """Size, mean, std and interpolation of the student's images."""
    return PreprocessCfg(**student.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]


def image_side(student: nn.Module) -> int:
    """The longer side of the student's image, in pixels."""
    size = preprocessing(student).size
    return size if isinstance(size, int) else max(size)


def train_pixels(student: nn.Module, crop_scale: tuple[float, float]) -> Pixels:
    """Random resized crop as open_clip trains, up to the tensor; `Towers` normalises on the device."""
    return _without_arithmetic(
        image_transform_v2(preprocessing(student), is_train=True, aug_cfg={"scale": crop_scale}).transforms
    )


def training_crop(student: nn.Module, crop_scale: tuple[float, float]) -> RandomResizedCrop:
    """The crop of `train_pixels` alone, with the student's size and interpolation."""
    crop = image_transform_v2(preprocessing(student), is_train=True, aug_cfg={"scale": crop_scale}).transforms[0]
    assert isinstance(crop, RandomResizedCrop)
    return crop


def plain_pixels(student: nn.Module) -> Pixels:
    """Resize and centre crop as open_clip evaluates, up to the tensor."""
    return _without_arithmetic(image_transform_v2(preprocessing(student), is_train=False).transforms)


def _without_arithmetic(steps: list[Any]) -> Pixels:
    # Bytes are a quarter of the floats that ToTensor and Normalize would make of them, and are moved twice.
    *moves, to_tensor, normalise = steps
    assert isinstance(to_tensor, ToTensor)
    assert isinstance(normalise, Normalize)
    pixels: Pixels = Compose([*moves, PILToTensor()])
    return pixels


class Towers(nn.Module):
    """The student as the loop calls it: bytes and tokens in, features and temperature out."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        wanted = preprocessing(student)
        for name, values in (("mean", wanted.mean), ("std", wanted.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 3, H, W), tokens int64 (B, L), L up to the context: features (B, D) twice, log scale ()."""
        log_scale: torch.Tensor = self.student.logit_scale  # type: ignore[assignment]
        return self.encode_images(images), self.encode_tokens(tokens), log_scale * 1.0

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) to (B, D); the arithmetic of torchvision's ToTensor and Normalize."""
        pixels = images.float().div(255).sub(self.mean).div(self.std)
        features: torch.Tensor = self.student.encode_image(pixels)  # type: ignore[operator]
        return features

    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 (B, L) to (B, D)."""
        clip = self.student
        if isinstance(clip, open_clip.CLIP) and tokens.shape[1] < clip.context_length:
            return _encode_short(clip, tokens)
        features: torch.Tensor = clip.encode_text(tokens)  # type: ignore[operator]
        return features

    @torch.no_grad()
    def takes_short_captions(self, tokens: torch.Tensor, length: int) -> bool:
        """Whether captions cut behind `length` tokens give the features of captions padded to the context.

        Args:
            tokens: int64 (n, L), padding behind `length`.
            length: columns to keep.
        """
        training = self.training
        self.eval()
        padded, short = self.encode_tokens(tokens), self.encode_tokens(tokens[:, :length])
        self.train(training)
        # Another length is another shape of matrix product: equal up to float32 rounding, never by accident.
        return bool((padded - short).abs().max() <= 1e-4 * padded.abs().max())

    @property
    def log_scale(self) -> torch.Tensor:
        """The parameter itself."""
        log_scale: torch.Tensor = self.student.logit_scale  # type: ignore[assignment]
        return log_scale


def _encode_short(clip: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """`CLIP.encode_text` of open_clip for captions shorter than the context, which it asserts by shape."""
    length = tokens.shape[1]
    dtype = clip.transformer.get_cast_dtype()
    x = clip.token_embedding(tokens).to(dtype) + clip.positional_embedding[:length].to(dtype)
    mask = None if clip.attn_mask is None else clip.attn_mask[:length, :length]
    x = clip.ln_final(clip.transformer(x, attn_mask=mask))
    x = text_global_pool(x, tokens, clip.text_pool_type, eos_token_id=getattr(clip, "text_eos_id", None))
    projection = clip.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    features: torch.Tensor = x
    return features
