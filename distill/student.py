"""The student: an open_clip model, and the geometry and tokens that it wants."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import text_global_pool
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import TextTransformer
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
        self.cuts_padding = False
        """Whether rows of like token length go through the text tower together, without the columns none needs."""
        wanted = preprocessing(student)
        for name, values in (("mean", wanted.mean), ("std", wanted.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, columns: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 3, H, W), tokens int64 (B, L), columns (B,): features (B, D) twice, log scale ()."""
        return self.encode_images(images), self.encode_tokens(tokens, columns), self.log_scale * 1.0

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) to (B, D); the arithmetic of torchvision's ToTensor and Normalize."""
        return self._encode_pixels(images.float().div(255).sub(self.mean).div(self.std))

    # Not compiled itself, or each division into groups would be a graph of its own; what it calls is compiled.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def encode_tokens(self, tokens: torch.Tensor, columns: Sequence[int] = ()) -> torch.Tensor:
        """int64 (B, L) to (B, D); with `cuts_padding`, in groups of rows that need about as many columns.

        The features are those of padded rows up to rounding, see `check_padding`.
        """
        if not self.cuts_padding or len(columns) != len(tokens):
            return self._encode_padded(tokens)
        groups = length_groups(columns, _GROUP_COST.get(tokens.device.type, _GROUP_COST["cuda"]))
        if len(groups) == 1:
            return self._encode_padded(tokens[:, : groups[0][0]])
        parts = [torch.tensor(rows, device=tokens.device) for _, rows in groups]
        features = [self._encode_padded(tokens[part, :length]) for (length, _), part in zip(groups, parts, strict=True)]
        return torch.cat(features)[torch.cat(parts).argsort()]

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.student.encode_image(pixels)  # type: ignore[operator]
        return features

    def _encode_padded(self, tokens: torch.Tensor) -> torch.Tensor:
        clip: Any = self.student
        text = clip if isinstance(clip, open_clip.CLIP) else clip.text
        native = isinstance(text, open_clip.CLIP | TextTransformer) and getattr(text, "cls_emb", None) is None
        # open_clip does not cut the causal mask of these, and CLIP's positions neither.
        if native and text.attn_mask is not None and tokens.shape[1] < text.context_length:
            return _encode_short(text, tokens)
        features: torch.Tensor = clip.encode_text(tokens)
        return features

    def compile(self) -> None:
        """Compile both towers; shapes of text groups are dynamic."""
        self._encode_pixels = torch.compile(self._encode_pixels)  # type: ignore[method-assign]
        self._encode_padded = torch.compile(self._encode_padded)  # type: ignore[method-assign]

    @torch.no_grad()
    def check_padding(self, tokens: torch.Tensor, columns: Sequence[int]) -> None:
        """Cut padding from now on if these captions, without it, have the features of padded ones.

        In float64, so that a tower whose features depend on padding ever so little is not taken for one that rounds
        otherwise: SigLIP's pools the last column, some attend to padding.

        Args:
            tokens: int64 (n, L).
            columns: (n,), less than L.
        """
        training = self.training
        self.eval().double()
        padded = self._encode_padded(tokens)
        cut = torch.cat([self._encode_padded(row[None, :length]) for row, length in zip(tokens, columns, strict=True)])
        self.cuts_padding = bool((padded - cut).abs().max() <= 1e-7 * padded.abs().max())
        self.float().train(training)

    @property
    def log_scale(self) -> torch.Tensor:
        """The parameter itself."""
        log_scale: torch.Tensor = self.student.logit_scale  # type: ignore[assignment]
        return log_scale


_GROUP_COST = {"cpu": 64, "cuda": 2048}
"""Tokens that a device could encode in the time that one more pass takes besides its tokens."""


def length_groups(columns: Sequence[int], cost: int) -> list[tuple[int, list[int]]]:
    """Return the division of rows by length that encodes the fewest columns: length and rows of each group.

    Args:
        columns: that each row needs, (B,).
        cost: of one more group, in columns.
    """
    rows = sorted(range(len(columns)), key=lambda row: columns[row])
    ends = [n for n in range(1, len(rows) + 1) if n == len(rows) or columns[rows[n]] > columns[rows[n - 1]]]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # rows so far: least cost, where their last group begins
    for end in ends:
        best[end] = min((best[start][0] + cost + (end - start) * columns[rows[end - 1]], start) for start in best)
    groups, end = [], len(rows)
    while end:
        start = best[end][1]
        groups.append((columns[rows[end - 1]], rows[start:end]))
        end = start
    return groups[::-1]


def _encode_short(text: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`encode_text` of open_clip's causal text towers for rows shorter than the context."""
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
    plain = isinstance(text, open_clip.CLIP)
    kind, end = (text.text_pool_type, text.text_eos_id) if plain else (text.pool_type, text.eos_id)
    x = text_global_pool(x, tokens, kind, eos_token_id=end)
    projection = text.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    features: torch.Tensor = x
    return features
