"""Small towers that begin from random weights, and what they see: pixels and token numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

from mmkd.demo.specialists import TEXT_WEIGHTS

SIZE = 64
"""Side of an image in pixels."""
IMAGE_MODEL, IMAGE_WIDTH = "test_resnet", 96
"""timm's smallest ResNet: 0.4 million parameters, four stages of one block."""
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 2, 4


class ImageTower(nn.Module):
    """float32 (N, 3, 64, 64) to (N, 96)."""

    def __init__(self) -> None:
        super().__init__()
        made = timm.create_model(IMAGE_MODEL, pretrained=False, num_classes=0)
        # Channels-last: twice as fast on a CPU.
        self.trunk = made.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pooled features."""
        found: Tensor = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        return found


class TextTower(nn.Module):
    """int64 (N, L) token numbers, 0 where padded, to (N, 128): the mean over the tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = BertModel(
            BertConfig(
                vocab_size=vocabulary, hidden_size=TEXT_WIDTH, num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=TEXT_HEADS, intermediate_size=4 * TEXT_WIDTH, max_position_embeddings=64,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
            ),
            add_pooling_layer=False,
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Means of the last layer."""
        there = (tokens != 0).to(torch.float32)
        last: Tensor = self.transformer(input_ids=tokens, attention_mask=there).last_hidden_state
        return (last * there[:, :, None]).sum(1) / there.sum(1, keepdim=True)


def read_pixels(folder: Path, names: Sequence[str]) -> Tensor:
    """Images of `folder` as float32 (N, 3, 64, 64) in [-1, 1]."""
    arrays = []
    for name in names:
        with Image.open(folder / name) as picture:
            small = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            arrays.append(np.asarray(small, dtype=np.float32) / 127.5 - 1)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def tokenize(captions: Sequence[str]) -> tuple[dict[str, Tensor], int]:
    """Token numbers of MiniLM's tokenizer, renumbered from 1 in order of the tokenizer's own among those that occur,
    each padded with 0 to the longest; and the size of the vocabulary. A table of 30,522 vectors would be most of the
    student, and none but these would ever be read."""
    tokenizer = AutoTokenizer.from_pretrained(str(TEXT_WEIGHTS.locate().parent))
    numbers: list[list[int]] = tokenizer(list(captions))["input_ids"]
    places = {token: place for place, token in enumerate(sorted({t for each in numbers for t in each}), start=1)}
    longest = max(map(len, numbers))
    made = {
        caption: torch.tensor([places[t] for t in each] + [0] * (longest - len(each)))
        for caption, each in zip(captions, numbers, strict=True)
    }
    return made, len(places) + 1
