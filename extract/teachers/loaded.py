"""A teacher in memory: the same front for every loader's model."""

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.geometry import normalize
from mmkd.extract.teachers.spec import Precision
from mmkd.extract.teachers.tokenizer import Tokenizer
from mmkd.store import TeacherCard
from mmkd.store.layout import Tower

log = logging.getLogger(__name__)

Pooling = Literal["model", "class", "mean", "class_mean"]
"""`model`: the model's own (timm's `global_pool`, transformers' `pooler_output`: an attention pool, a dense layer);
`class`: the first token; `mean`: of the patches, or of a caption's tokens; `class_mean`: both, one after the other."""

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def half_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the type that autocast computes in; None for float32."""
    if precision != "auto":
        return _HALVES.get(precision)
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


_Encode = Callable[[torch.Tensor], torch.Tensor]
_Tokenizer = Tokenizer | None  # None without a text tower


class LoadedTeacher:
    """A model in evaluation mode behind the `Teacher` protocol. In half precision, rows that come out with NaN or
    infinity are computed again in float32, and counted in `half_precision_failures`. Of `model`, `encode_image` takes
    normalized float32 (B, 3, H, W), `encode_text` int64 (B, L); both give (B, D). A tower that the card does not list
    is never asked; calling it raises UserError."""

    def __init__(
        self, card: TeacherCard, precision: Precision, device: torch.device, model: nn.Module, tokenizer: _Tokenizer
    ) -> None:
        model.eval().requires_grad_(False)
        self._model: Any = model.to(device)
        self.card, self.device, self._tokenizer = card, device, tokenizer
        self._half = half_type(precision, device)
        self.half_precision_failures = 0
        self.row_flops: dict[tuple[Tower, int], float] = {}
        """Of one image, under (`image`, 0), and of one caption of so many tokens; empty until they are counted."""
        self.tune()

    def in_precision(self, precision: Precision) -> "LoadedTeacher":
        """Return the same weights with other arithmetic."""
        return LoadedTeacher(self.card, precision, self.device, self._model, self._tokenizer)

    def tune(self, *, channels_last: bool = True, compiled: bool = False) -> None:
        """Choose how the same forward pass is computed; only last bits may change. `channels_last`: convolutions'
        weights. `compiled`: `torch.compile` both towers. Raises TeacherError if there is no C++ compiler for it."""
        self._model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self._encode: dict[Tower, _Encode] = {
            tower: getattr(self._model, f"encode_{tower}") for tower in self.card.towers
        }
        if compiled:
            compiler = os.environ.get("CXX", "g++")
            if self.device.type == "cpu" and shutil.which(compiler) is None:
                raise TeacherError(f"worker.compile needs the C++ compiler {compiler!r}, not found here; leave it off")
            # On a CPU shapes are fixed, and one code for several would depend on which came first.
            dynamic = self.device.type != "cpu"
            self._encode = {tower: torch.compile(encode, dynamic=dynamic) for tower, encode in self._encode.items()}

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 (B, C, H, W) of the teacher's geometry; returns float32 (B, D)."""
        return self.recompute_overflow("image", pixels, self.launch("image", pixels))

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Return int64 (B, L) padded to the context, and each caption's tokens before it is cut."""
        if not captions:
            return torch.zeros(0, self.card.context_length, dtype=torch.long), []
        self.card.tower_arrays("text")  # or the error that there is none
        assert self._tokenizer is not None
        return self._tokenizer(captions)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens that `encode_texts` takes, ascending: the context alone where padding reaches a feature."""
        return self._tokenizer.lengths if self._tokenizer is not None else ()

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode int64 (B, L), L one of `text_lengths`; returns float32 (B, D)."""
        return self.recompute_overflow("text", tokens, self.launch("text", tokens))

    @torch.inference_mode()
    def launch(self, tower: Tower, inputs: torch.Tensor) -> torch.Tensor:
        """Encode as `encode_images` or `encode_texts`, without looking at the result, which would wait for a device: in
        half precision rows may be NaN or infinite until `recompute_overflow` has seen them."""
        if inputs.shape[0] == 0:
            return torch.zeros(0, self.card.dim, device=self.device)
        if self._half is None:
            return self._forward(tower, inputs)
        with torch.autocast(self.device.type, dtype=self._half):
            return self._forward(tower, inputs)

    @torch.inference_mode()
    def recompute_overflow(
        self, tower: Tower, inputs: torch.Tensor, features: torch.Tensor, rows: int = 32
    ) -> torch.Tensor:
        """Return features float32 (B, D), on any device, with those that half precision broke computed again in
        float32, `rows` at a time, from their inputs."""
        broken = ~torch.isfinite(features).all(dim=1) if self._half is not None else torch.zeros(0)
        if count := int(broken.sum()):
            if not self.half_precision_failures:
                log.warning("teacher %r: NaN in %s, such rows are computed in float32", self.card.slug, self._half)
            self.half_precision_failures += count
            for some in torch.split(broken.nonzero()[:, 0], rows):
                features[some] = self._forward(tower, inputs[some.to(inputs.device)]).to(features.device)
        return features

    @property
    def half(self) -> bool:
        """True where passes compute in half precision."""
        return self._half is not None

    def flops(self, tower: Tower, inputs: torch.Tensor) -> float:
        """Return floating-point operations of a pass over `inputs`, two for a multiply-add: of L tokens a L + b L^2,
        as those of a transformer, through the lengths that were counted. 0.0 where none were."""
        if tower == "image":
            return len(inputs) * self.row_flops.get(("image", 0), 0.0)
        counted = sorted((length, flops / length) for (kind, length), flops in self.row_flops.items() if kind == "text")
        if not counted:
            return 0.0
        lengths, per_token = zip(*counted, strict=True)  # of which the second is a + b L
        return inputs.numel() * float(np.interp(inputs.shape[1], lengths, per_token))

    def _forward(self, tower: Tower, inputs: torch.Tensor) -> torch.Tensor:
        self.card.tower_arrays(tower)  # or the error that there is none
        if tower == "image":
            images = normalize(inputs, self.card.image_preprocessing)
            inputs = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return self._encode[tower](inputs).float()


def pool_tokens(states: torch.Tensor, pooling: Pooling, counted: torch.Tensor | int) -> torch.Tensor:
    """Return (B, D), of `class_mean` (B, 2 D). `states`: (B, N, D), the class token first. `counted`: the tokens that a
    mean is over, bool (B, N), or the number of the first."""
    if pooling == "class":
        return states[:, 0]
    if isinstance(counted, int):
        mean = states[:, counted:].mean(1)
    else:
        weights = counted.to(states.dtype)[:, :, None]
        mean = (states * weights).sum(1) / weights.sum(1)
    return mean if pooling == "mean" else torch.cat([states[:, 0], mean], dim=1)


def out_of_memory(slug: str, device: torch.device, tower: str) -> TeacherError:
    """Return the error of a device that has no memory for a single row."""
    return TeacherError(
        f"teacher {slug!r}: {device} has too little memory for one {tower}; give fewer teachers a run, "
        "fewer processes a device, or another device"
    )
