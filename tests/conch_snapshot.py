"""A tiny CONCH in its published format, its forward pass written from the authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from tests.teacher_parts import Snapshot, loud, spec_of

WIDTH, LAYERS, HEADS, DIM, WORDS = 64, 2, 4, 512, 32007


def conch(folder: Path) -> Snapshot:
    """The weights with decoder, and the tokenizer of the authors' code beside them."""
    trunk = loud(timm.models.VisionTransformer(448, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=0), 1)
    head = loud(
        nn.ModuleDict({
            "attn": nn.MultiheadAttention(DIM, 8, kdim=WIDTH, vdim=WIDTH), "ln_q": nn.LayerNorm(DIM),
            "ln_k": nn.LayerNorm(WIDTH), "out": nn.LayerNorm(DIM),
        }), 2,
    )  # fmt: skip
    text = loud(
        nn.ModuleDict({"token_embedding": nn.Embedding(WORDS, WIDTH), "ln_final": nn.LayerNorm(WIDTH)} | {
            f"transformer.resblocks.{layer}.{part}".replace(".", "/"): module
            for layer in range(LAYERS)
            for part, module in (
                ("ln_1", nn.LayerNorm(WIDTH)), ("attn", nn.MultiheadAttention(WIDTH, HEADS)),
                ("ln_2", nn.LayerNorm(WIDTH)), ("mlp.c_fc", nn.Linear(WIDTH, 4 * WIDTH)),
                ("mlp.c_proj", nn.Linear(4 * WIDTH, WIDTH)),
            )
        }), 3,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(4)
    query, projection = torch.randn(1, DIM, generator=draw), torch.randn(DIM, DIM, generator=draw) / DIM**0.5
    cls, positions = torch.randn(WIDTH, generator=draw), torch.randn(128, WIDTH, generator=draw)
    text_projection = torch.randn(WIDTH, DIM, generator=draw) / WIDTH**0.5
    sd = {f"visual.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    sd |= {f"visual.attn_pool_contrast.{name}": tensor for name, tensor in head.state_dict().items()
           if not name.startswith("out")}  # fmt: skip
    sd |= {f"visual.ln_contrast.{name}": tensor for name, tensor in head["out"].state_dict().items()}
    sd |= {f"text.{name}".replace("/", "."): tensor for name, tensor in text.state_dict().items()}
    sd |= {"visual.attn_pool_contrast.query": query, "visual.proj_contrast": projection, "text.cls_emb": cls}
    sd |= {"text.positional_embedding": positions, "text.text_projection": text_projection}
    sd |= {"logit_scale": torch.tensor(4.0), "visual.attn_pool_caption.query": torch.zeros(256, 768)}
    sd |= {"visual.ln_caption.weight": torch.ones(768), "text_decoder.text_projection": torch.zeros(768, WORDS)}
    torch.save(sd, folder / "pytorch_model.bin")
    _write_tokenizer(folder)

    def encode_image(image: torch.Tensor) -> torch.Tensor:
        keys = head["ln_k"](trunk.forward_features(image)).permute(1, 0, 2)
        asked = head["ln_q"](query).unsqueeze(1).repeat(1, len(image), 1)
        pooled = head["attn"](asked, keys, keys, need_weights=False)[0].permute(1, 0, 2)[:, 0]
        return head["out"](pooled) @ projection

    def encode_text(tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1] + 1
        x = torch.cat([text["token_embedding"](tokens), cls.expand(len(tokens), 1, -1)], dim=1)
        x = (x + positions[:length]).permute(1, 0, 2)
        seen = F.pad((tokens != 0).unsqueeze(1), (1, 0, tokens.shape[1], 0), value=1.0)
        mask = torch.zeros(seen.shape).masked_fill(~seen.bool(), float("-inf")).repeat_interleave(HEADS, 0)
        mask = mask + torch.full((length, length), float("-inf")).triu(1)
        for layer in range(LAYERS):
            part = {name: text[f"transformer/resblocks/{layer}/{name}"] for name in ("ln_1", "attn", "ln_2")}
            first, second = (text[f"transformer/resblocks/{layer}/mlp/{name}"] for name in ("c_fc", "c_proj"))
            given = part["ln_1"](x)
            x = x + part["attn"](given, given, given, need_weights=False, attn_mask=mask)[0]
            x = x + second(F.gelu(first(part["ln_2"](x))))
        return text["ln_final"](x[-1]) @ text_projection

    options = {"width": WIDTH, "layers": LAYERS, "heads": HEADS}
    return Snapshot(spec_of("conch", folder, "conch", options=options), encode_image, encode_text)


def _write_tokenizer(folder: Path) -> None:
    """What docs/teachers.md says to put beside the weights: one word a letter here, and the authors' special tokens."""
    words = ["<pad>", "<start_of_text>", "<end_of_text>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [("<start_of_text>", 1), ("<end_of_text>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<start_of_text> $0 <end_of_text>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | special))
