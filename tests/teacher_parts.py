"""What the synthesised snapshots are made of: loud weights, tiny tokenizers, tiny configurations."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from mmkd.extract.teachers.spec import TeacherSpec
from tests.plain_towers import State, plain_text, plain_vit

CAPTIONS = ["chest x ray", "a b", "mri of the brain with contrast " * 3, "histology"]
DIM = 24
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclass(frozen=True)
class Snapshot:
    """A published folder and what its features must be."""

    spec: TeacherSpec
    image: Callable[[torch.Tensor], torch.Tensor]
    """Normalised float images (B, 3, H, W) to features."""
    text: Callable[[torch.Tensor], torch.Tensor]
    """Token ids (B, L), padded as the authors pad, to features."""


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No connection can be made, and hashes are not remembered between tests."""

    def refuse(*_: object) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((70, 41), (40, 64), (33, 33))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def loud(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights large enough that every nonlinearity is felt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif name == "logit_scale":
                tensor.fill_(3.0)
            elif tensor.ndim < 2:
                is_scale = name.endswith("weight")
                tensor.copy_((1 if is_scale else 0) + 0.4 * noise)
            else:
                fan_in = max(1, tensor[0].numel())
                tensor.copy_(noise * (1.0 if "embed" in name else 1.8 / fan_in**0.5))
    return module.eval()


BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "vocab_size": 40,
    "pad_token_id": 0,
}


def write_bert_tokenizer(folder: Path) -> None:
    """[PAD] [UNK] [CLS] [SEP] [MASK] first, as in PubMedBERT, then letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "##a", "##r", "##i", "##e", "##n"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer"})
    )


def write_clip_tokenizer(folder: Path) -> None:
    """Byte-level BPE with two merges; the end token has the highest id."""
    from open_clip.tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(s + "</w>" for s in symbols), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def bert(seed: int, pooler: bool, **changes: object) -> transformers.BertModel:
    fields = {name: value for name, value in (BERT | changes).items() if name != "model_type"}
    return loud(transformers.BertModel(transformers.BertConfig(**fields), add_pooling_layer=pooler), seed)


NATIVE = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def native_state(seed: int = 0) -> State:
    return dict(loud(open_clip.CLIP(**json.loads(json.dumps(NATIVE))), seed).state_dict())


def register(folder: Path, name: str, **changes: object) -> None:
    """Give open_clip a tiny architecture by name, as its users may."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(NATIVE | changes))
    open_clip.add_model_config(path)


def spec_of(slug: str, folder: Path, loader: str, **changes: object) -> TeacherSpec:
    return TeacherSpec.model_validate({"slug": slug, "source": f"local-dir:{folder}", "loader": loader} | changes)


def native_snapshot(spec: TeacherSpec, sd: State, act: Callable[[torch.Tensor], torch.Tensor]) -> Snapshot:
    return Snapshot(spec, lambda image: plain_vit(sd, image, 2, act), lambda tokens: plain_text(sd, tokens, 4, act))
