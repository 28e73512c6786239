"""A teacher in memory: the same front for every loader's model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.geometry import normalize
from mmkd.extract.teachers.protocol import Towers
from mmkd.extract.teachers.spec import Precision
from mmkd.extract.teachers.tokenizer import Tokenizer
from mmkd.store import TeacherCard

log = logging.getLogger(__name__)

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def half_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the type that autocast computes in; None for float32."""
    if precision != "auto":
        return _HALVES.get(precision)
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass(frozen=True)
class _Compiled:
    """Both towers behind `torch.compile`."""

    encode_image: Callable[[torch.Tensor], torch.Tensor]
    encode_text: Callable[[torch.Tensor], torch.Tensor]


class LoadedTeacher:
    """A model in evaluation mode behind the `Teacher` protocol. In half precision, rows that come out with NaN or
    infinity are computed again in float32, and counted in `half_precision_failures`.

    Args:
        card: its identity.
        precision: arithmetic of the forward pass.
        device: where to put the weights.
        model: has `encode_image` and `encode_text` as `Towers` says.
        tokenizer: captions to ids.
    """

    def __init__(
        self, card: TeacherCard, precision: Precision, device: torch.device, model: nn.Module, tokenizer: Tokenizer
    ) -> None:
        model.eval().requires_grad_(False)
        self._model = model.to(device)
        self._towers: Towers | _Compiled = cast(Towers, self._model)
        self.tune()
        self._half = half_type(precision, device)
        self._device, self._tokenizer = device, tokenizer
        self.half_precision_failures = 0
        self._card = card

    def in_precision(self, precision: Precision) -> LoadedTeacher:
        """Return the same weights with other arithmetic."""
        return LoadedTeacher(self._card, precision, self._device, self._model, self._tokenizer)

    def tune(self, *, channels_last: bool = True, compiled: bool = False) -> None:
        """Choose how the same forward pass is computed; only last bits may change. Raises TeacherError if there is no
        C++ compiler for the CPU. `channels_last`: order of the convolutions' weights. On by default:
        benchmarks/forward.py. `compiled`: `torch.compile` both towers, each shape at its first pass."""
        order = torch.channels_last if channels_last else torch.contiguous_format
        self._model.to(memory_format=order)
        self._towers = cast(Towers, self._model)
        if compiled:
            compiler = os.environ.get("CXX", "g++")
            if self._device.type == "cpu" and shutil.which(compiler) is None:
                raise TeacherError(
                    f"worker.compile needs the C++ compiler {compiler!r}, which is not here; leave it off"
                )
            # On a CPU shapes are fixed, and one code for several would depend on which came first.
            compiling = partial(torch.compile, dynamic=self._device.type != "cpu")
            self._towers = _Compiled(compiling(self._towers.encode_image), compiling(self._towers.encode_text))

    @property
    def card(self) -> TeacherCard:
        """The card it was loaded for."""
        return self._card

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._device

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 (B, C, H, W) of the teacher's geometry to float32 (B, D)."""
        images = normalize(pixels, self._card.preprocessing)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self._run(images, self._towers.encode_image)

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Return int64 (B, L) padded to the context, and each caption's tokens before it is cut."""
        if not captions:
            return torch.zeros(0, self._card.context_length, dtype=torch.long), []
        return self._tokenizer(captions)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens that `encode_texts` takes, ascending: the context alone where padding reaches a feature."""
        return self._tokenizer.lengths

    @torch.inference_mode()
    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return int64 (B, L) to float32 (B, D), L one of `text_lengths`."""
        return self._run(tokens, self._towers.encode_text)

    def _run(self, inputs: torch.Tensor, tower: object) -> torch.Tensor:
        assert callable(tower)
        if inputs.shape[0] == 0:
            return torch.zeros(0, self._card.dim, device=self._device)
        if self._half is None:
            return cast(torch.Tensor, tower(inputs)).float()
        with torch.autocast(self._device.type, dtype=self._half):
            features = cast(torch.Tensor, tower(inputs)).float()
        broken = ~torch.isfinite(features).all(dim=1)
        if broken.any():
            count = int(broken.sum())
            if not self.half_precision_failures:
                log.warning("teacher %r: NaN in %s, such rows are computed in float32", self._card.slug, self._half)
            self.half_precision_failures += count
            features[broken] = cast(torch.Tensor, tower(inputs[broken])).float()
        return features


def check_digest(found: TeacherCard, card: TeacherCard) -> None:
    """Refuse to load files other than those the card was written for. Raises TeacherError with both digests and the
    differences."""
    # How features are kept is the run's choice; the files have no say in it.
    found = found.with_encoding(card.encoding)
    if found.digest == card.digest:
        return
    names = ("weights_sha256", "preprocessing", "tokenizer_sha256", "context_length", "dim", "loader", "normalized")
    changed = [name for name in names if getattr(found, name) != getattr(card, name)]
    raise TeacherError(
        f"teacher {card.slug!r} is no longer what its card says: digest {found.digest} at {found.source}, "
        f"expected {card.digest} (different: {', '.join(changed)}); put the former files back or use another name"
    )
