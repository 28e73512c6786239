"""The student's towers: padding that costs nothing, first weights, locks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import set_model_preprocess_cfg
from tiny_teachers import TINY
from transformers import BertConfig, BertModel

from mmkd.distill.student import Towers, length_groups

TEXT = TINY["text_cfg"]
NATIVE: dict[str, tuple[dict[str, Any], bool]] = {
    "clip": ({}, True),
    "eos pooling": ({"pool_type": "eos", "eos_id": 49407}, True),
    "last column": ({"pool_type": "last"}, False),
    "custom, causal": ({"custom": True}, True),
    "custom, attends to padding": ({"custom": True, "no_causal_mask": True}, False),
    "class token behind the text": ({"custom": True, "embed_cls": True}, False),
}


def towers_of(text: dict[str, Any]) -> Towers:
    settings = dict(text)
    kind = open_clip.CustomTextCLIP if settings.pop("custom", False) else open_clip.CLIP
    torch.manual_seed(0)
    clip = kind(**TINY | {"text_cfg": TEXT | {"layers": 3} | settings})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    return Towers(clip)


def rows_of(lengths: list[int], end: int = 49407) -> torch.Tensor:
    """Captions of these lengths, sixteen columns."""
    tokens = torch.zeros(len(lengths), 16, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, min(end, 40_000), (length,), generator=generator)
        row[length - 1] = end
    return tokens


def check(towers: Towers, end: int, exact: bool) -> None:
    lengths = [3, 16, 8, 5, 12, 9, 2, 3, 4, 7, 16, 1] * 10
    tokens, columns = rows_of(lengths, end), [8 if length <= 8 else 16 for length in lengths]
    short = [n for n, length in enumerate(lengths) if length <= 8]
    towers.check_padding(tokens[short], [8] * len(short))
    assert towers.cuts_padding is exact
    assert towers.training
    towers.eval()
    assert next(towers.parameters()).dtype == torch.float32
    assert length_groups(columns, 64) == [(8, short), (16, [n for n in range(120) if n not in short])]
    whole, cut = towers.encode_tokens(tokens), towers.encode_tokens(tokens, columns)
    assert (whole - cut).abs().max() <= 1e-6 * whole.abs().max()


@pytest.mark.parametrize("name", NATIVE)
def test_rows_of_like_length_give_the_features_of_padded_ones(name: str) -> None:
    text, exact = NATIVE[name]
    check(towers_of(text), 49407, exact)


@pytest.mark.parametrize("pooler", ["cls_pooler", "mean_pooler", "cls_last_hidden_state_pooler"])
def test_transformers_towers_mask_their_padding(pooler: str, tmp_path: Path) -> None:
    bert = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    BertModel(bert).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_pooler_type": pooler, "hf_proj_type": "linear", "context_length": 16}
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**TINY | {"text_cfg": text})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    check(Towers(clip), 99, exact=True)
    clip.text.config.pad_token_id = 98  # padding is not what the tower masks
    check(Towers(clip), 99, exact=False)


@given(st.lists(st.integers(1, 10).map(lambda n: 8 * n), min_size=1, max_size=40), st.integers(0, 200))
def test_groups_hold_every_row_once_and_cost_least(columns: list[int], cost: int) -> None:
    groups = length_groups(columns, cost)
    assert sorted(row for _, rows in groups for row in rows) == list(range(len(columns)))
    assert all(length == max(columns[row] for row in rows) for length, rows in groups)
    spent = sum(cost + length * len(rows) for length, rows in groups)
    padded = cost + max(columns) * len(columns)
    each = sum(cost + length * columns.count(length) for length in set(columns))
    assert spent <= min(padded, each)
