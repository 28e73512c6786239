"""Tiny copies of the nine teachers in exactly the file formats they are published in, each with a reference forward.

Weights are drawn large ("loud"), so that a wrong activation, head count, pooling, mask or transposed projection changes
a feature visibly. The references are written in plain torch from the authors' code, or put together from timm and
transformers; none of them goes through the loaders under test.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from mmkd.extract.teachers.published import find_published
from tests.clip_snapshots import genmedclip, plip, pubmedclip, pubmedclip_original, quiltnet
from tests.plain_towers import plain_resnet, plain_vit, quick_gelu
from tests.teacher_parts import (
    BERT,
    CAPTIONS,
    DIM,
    OPENAI,
    Snapshot,
    bert,
    loud,
    native_snapshot,
    native_state,
    pictures,
    register,
    spec_of,
    write_bert_tokenizer,
)

__all__ = [
    "CAPTIONS", "DIM", "Snapshot", "loud", "native_state", "pictures", "pubmedclip_original", "write_bert_tokenizer",
]  # fmt: skip


def bmca(folder: Path, numpy_scalars: bool = False) -> Snapshot:
    """A lone training checkpoint of open_clip."""
    sd = native_state(1)
    register(folder, "tiny-clip")
    content = {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{k}": v for k, v in sd.items()},
        "optimizer": {"state": {}},
    }
    torch.save(content | ({"loss": np.float64(0.25)} if numpy_scalars else {}), folder / "BMC_CLIP_CF.pt")
    spec = spec_of("bmca", folder, "open_clip", weights=("BMC_CLIP_CF.pt",), options={"architecture": "tiny-clip"})
    return native_snapshot(spec, sd, F.gelu)


def _masked_cls(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0]


def biomedclip(folder: Path, weights: str = "open_clip_pytorch_model.bin", projection: str | None = "mlp") -> Snapshot:
    """An open_clip folder with a timm image tower and a BERT; the config of the BERT lies beside."""
    config = {
        "model_cfg": {
            "embed_dim": DIM,
            "vision_cfg": {
                "timm_model_name": "test_vit",
                "timm_model_pretrained": True,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 160,
            },
            "text_cfg": {
                "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 64,
            }
            | ({"hf_proj_type": projection} if projection else {}),
        },
        "preprocess_cfg": OPENAI,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(BERT))
    write_bert_tokenizer(folder)
    trunk = loud(timm.create_model("test_vit", num_classes=0, global_pool="token"), 2)
    text = bert(3, pooler=False)
    head, first, second = (
        loud(nn.Linear(*shape, bias=False), 4) for shape in ((64, DIM), (32, (32 + DIM) // 2), ((32 + DIM) // 2, DIM))
    )
    sd = {f"visual.trunk.{k}": v for k, v in trunk.state_dict().items()} | {
        f"text.transformer.{k}": v for k, v in text.state_dict().items()
    }
    sd |= {
        "visual.head.proj.weight": head.weight,
        "text.proj.0.weight": first.weight,
        "text.proj.2.weight": second.weight,
    }
    sd |= {"logit_scale": torch.tensor(3.0)}
    if weights.endswith(".safetensors"):
        save_file({k: v.detach().clone() for k, v in sd.items()}, folder / weights)
    else:
        torch.save(sd | {"text.transformer.embeddings.position_ids": torch.arange(128)[None]}, folder / weights)
    return Snapshot(
        spec_of("biomedclip", folder, "open_clip"),
        lambda image: head(trunk(image)),
        lambda tokens: second(F.gelu(first(_masked_cls(text, tokens)))),
    )


def unimedclip(folder: Path, numpy_scalars: bool = False) -> Snapshot:
    """A training checkpoint of the fork: BERT under `text_encoder.`, QuickGELU in the image tower only."""
    visual = {k: v for k, v in native_state(5).items() if k.startswith("visual.")}
    text = bert(6, pooler=False)
    first, second = (
        loud(nn.Linear(*shape, bias=False), 7) for shape in ((32, (32 + DIM) // 2), ((32 + DIM) // 2, DIM))
    )
    sd = visual | {f"text_encoder.transformer.{k}": v for k, v in text.state_dict().items()}
    sd |= {
        "text_encoder.proj.0.weight": first.weight,
        "text_encoder.proj.2.weight": second.weight,
        "logit_scale": torch.tensor(3.0),
    }
    sd |= {"text_encoder.transformer.embeddings.position_ids": torch.arange(128)[None]}
    register(folder, "tiny-clip-quickgelu", quick_gelu=True)
    content = {"state_dict": {f"module.{k}": v for k, v in sd.items()}, "optimizer": {"state": {}}}
    torch.save(content | ({"scaler": np.float64(2.0)} if numpy_scalars else {}), folder / "unimed-clip-vit-b16.pt")
    (folder / "config.json").write_text(json.dumps(BERT))
    write_bert_tokenizer(folder)
    spec = spec_of(
        "unimedclip",
        folder,
        "open_clip",
        weights=("unimed-clip-vit-b16.pt",),
        options=find_published("unimedclip").options | {"architecture": "tiny-clip-quickgelu"},
        context_length=64,
    )
    return Snapshot(
        spec,
        lambda image: plain_vit(visual, image, 2, quick_gelu),
        lambda tokens: second(F.gelu(first(_masked_cls(text, tokens)))),
    )


def pmcclip(
    folder: Path, whole: bool = False, heads: int = 8, pooler: bool = False, mask: bool = False, **options: object
) -> Snapshot:
    """The quick start's three files, or the training checkpoint with its fusion module."""
    from open_clip.modified_resnet import ModifiedResNet

    visual = dict(loud(ModifiedResNet([1, 1, 1, 1], DIM, heads=8, image_size=64, width=16), 8).state_dict())
    text = bert(9, pooler=True)
    text_state = text.state_dict() | {"embeddings.position_ids": torch.arange(128)[None]}
    projection = torch.randn(32, DIM, generator=torch.Generator().manual_seed(10))
    (folder / "config.json").write_text(json.dumps(BERT))
    write_bert_tokenizer(folder)
    if whole:
        sd = {f"visual.{k}": v for k, v in visual.items()} | {f"text_encoder.{k}": v for k, v in text_state.items()}
        sd |= {
            "text_projection": projection,
            "logit_scale": torch.tensor(4.4292),
            "mlm_projection": torch.zeros(32, 40),
        }
        sd |= {"positional_embedding": torch.zeros(77, 32), "img_special_token": torch.zeros(1, 1, DIM)}
        sd |= {
            "ln_final.weight": torch.ones(32),
            "ln_final.bias": torch.zeros(32),
            "fusion_module.resblocks.0.ln_1.weight": torch.ones(32),
        }
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in sd.items()}}, folder / "checkpoint.pt")
    else:
        torch.save(visual, folder / "image_encoder(resnet50).pth")
        torch.save(text_state, folder / "text_encoder.pth")
        torch.save(projection, folder / "text_projection_layer.pth")

    def encode_text(tokens: torch.Tensor) -> torch.Tensor:
        output = text(input_ids=tokens, **({"attention_mask": (tokens != 0).long()} if mask else {}))
        return (output.pooler_output if pooler else output.last_hidden_state[:, 0]) @ projection

    spec = spec_of(
        "pmcclip",
        folder,
        "pmc_clip",
        weights=("checkpoint.pt",) if whole else (),
        options={"image_size": 64, "dim": DIM} | options,
    )
    return Snapshot(spec, lambda image: plain_resnet(visual, image, heads), encode_text)


def genmedclip_pmb(folder: Path) -> Snapshot:
    """The B-16-PMB form: safetensors, timm, no hf_proj_type (open_clip's default is an MLP)."""
    return biomedclip(folder, "open_clip_model.safetensors", projection=None)


SWIN = {"image_size": 32, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}


def medclip(folder: Path, resnet: bool = False) -> Snapshot:
    """One file with both towers; Swin under the names of older transformers."""
    text = bert(17, pooler=True)
    projection = loud(nn.Linear(32, DIM, bias=False), 18)
    sd = {f"text_model.model.{k}": v for k, v in text.state_dict().items()}
    sd |= {"text_model.model.embeddings.position_ids": torch.arange(128)[None], "logit_scale": torch.tensor(2.6593)}
    sd |= {"text_model.projection_head.weight": projection.weight}
    if resnet:
        tower = torchvision.models.resnet50(weights=None)
        tower.fc = nn.Linear(2048, DIM, bias=False)
        loud(tower, 16)
        sd |= {f"vision_model.model.{k}": v for k, v in tower.state_dict().items()}
        options: dict[str, object] = {"image_tower": "resnet50", "dim": DIM, "swin": {"image_size": 32}}

        def encode_image(image: torch.Tensor) -> torch.Tensor:
            return tower(image)
    else:
        swin = loud(transformers.SwinModel(transformers.SwinConfig(**SWIN)), 16)
        head = loud(nn.Linear(32, DIM, bias=False), 19)
        swin.save_pretrained(folder / "old-names")
        old = load_file(folder / "old-names" / "model.safetensors")
        assert any(".attention.self.query." in name for name in old)
        sd |= {f"vision_model.model.{k}": v for k, v in old.items()} | {
            "vision_model.projection_head.weight": head.weight
        }
        options = {"swin": SWIN, "dim": DIM}

        def encode_image(image: torch.Tensor) -> torch.Tensor:
            return head(swin(pixel_values=image).pooler_output)

    torch.save(sd, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(BERT))
    write_bert_tokenizer(folder)

    def encode_text(tokens: torch.Tensor) -> torch.Tensor:
        # Each caption alone, without padding: the authors' forward for a batch of one.
        features = []
        for row in tokens:
            ids = row[row != 0][None]
            states = text(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
            layers = torch.stack([states[1], states[2], states[-1]])
            features.append(projection(layers.permute(1, 0, 2, 3).mean(2).mean(1)))
        return torch.cat(features)

    return Snapshot(spec_of("medclip", folder, "medclip", options=options), encode_image, encode_text)


NINE = {
    "bmca": bmca,
    "biomedclip": biomedclip,
    "unimedclip": unimedclip,
    "pmcclip": pmcclip,
    "quiltnet": quiltnet,
    "genmedclip": genmedclip,
    "plip": plip,
    "pubmedclip": pubmedclip,
    "medclip": medclip,
}
"""The nine, as `mmkd teachers list` names them."""
