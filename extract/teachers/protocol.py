"""Interface of a teacher; see the docs for the entry point. Shapes: B batch, H and W the teacher's image size, L its
context length, D its feature width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from mmkd.store import TeacherCard


@runtime_checkable
class Teacher(Protocol):
    """A loaded encoder in evaluation mode on one device, with the towers that its card lists: without an image tower
    `encode_images` is never called, without a text tower neither `tokenize` nor `encode_texts`. With an attribute
    `text_lengths: tuple[int, ...]`, ascending and ending in the context, `encode_texts` gets captions cut to the
    smallest of these that holds them."""

    @property
    def card(self) -> TeacherCard:
        """Identity; its digest goes into every ledger entry."""

    @property
    def device(self) -> torch.device:
        """Device of the weights and of the input of `encode_*`."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images that have the teacher's geometry already. Returns float32 (B, D), the encoder's own output, not
        normalized unless the card says so. `pixels`: uint8 (B, C, H, W) on `device`: resized, cropped and in the card's
        color mode (C is 3 for RGB, 1 for L). Scaling to 0..1, mean and std are applied by the teacher."""

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Turn captions into token ids. Returns int64 (B, L) padded to the context length, and for every caption the
        number of tokens that it has before it is cut to the context (special tokens included)."""

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode token ids int64 (B, L) on `device`; returns float32 (B, D) as `encode_images` does."""
