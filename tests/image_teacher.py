"""A teacher with an image tower alone, without weights."""

from __future__ import annotations

import torch

from mmkd.store import Preprocessing, TeacherCard

DIM = 24


class Seer:
    """An image tower alone: a random projection of 4 x 4 patches. Its text side must never be called."""

    device = torch.device("cpu")
    card = TeacherCard(
        slug="seer",
        source="made-up",
        weights_sha256="5ee7",
        towers=("image",),
        preprocessing=Preprocessing(image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
        dim=DIM,
    )

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patches through a matrix that is a function of nothing."""
        weight = torch.randn(DIM, 3 * 4 * 4, generator=torch.Generator().manual_seed(7))
        patches = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255 - 0.5, 4).flatten(1)
        return patches @ weight.T

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        raise AssertionError("a text tower was asked that is not there")

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a text tower was asked that is not there")
