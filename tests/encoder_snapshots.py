"""Tiny encoders with one tower, saved by timm and transformers themselves, each with a reference that is not ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import transformers
from timm.models import save_for_hf

from mmkd.extract.teachers.spec import TeacherSpec
from tests.teacher_parts import loud, spec_of, write_bert_tokenizer

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BIT = IMAGENET | {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 40}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True,
}  # fmt: skip
"""As facebook/dinov2-base has it, at an eighth of the size."""
VIT = IMAGENET | {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, "do_normalize": True}
"""As the first ViTs have it: one number is both sides."""

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """A published folder and what the features of its only tower must be."""

    spec: TeacherSpec
    forward: Forward
    """Normalized images (B, 3, H, W), or token ids (B, L), to features."""
    transform: Callable[..., object] | None = field(default=None)
    """A picture to normalized pixels, by the library."""


def timm_folder(
    folder: Path, name: str, forward: Callable[[torch.nn.Module], Forward], old: bool = False, **given: object
) -> Encoder:
    """A model of timm; `old` writes the configuration as UNI's is: arguments at its top, weights without a header.
    `given`: the loader's options, and `transform`, changes of `pretrained_cfg`."""
    options = dict(given)
    transform = dict(options.pop("transform", {}))  # type: ignore[call-overload]
    arguments = dict(options.get("model_args", {}))  # type: ignore[call-overload]
    classes = {"mlp_layer": timm.layers.SwiGLUPacked} if "mlp_layer" in arguments else {}
    model = loud(timm.create_model(name, pretrained_cfg_overlay=transform, **(arguments | classes)), 5)
    if old:
        config = {"architecture": name, "num_features": model.num_features, "pretrained_cfg": model.pretrained_cfg}
        (folder / "config.json").write_text(json.dumps(config | arguments, default=str))
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        save_for_hf(model, folder, model_args=dict.fromkeys(classes), safe_serialization=True)  # JSON holds no class
    data = timm.data.resolve_data_config({}, model=model)
    return Encoder(spec_of("mine", folder, "auto", options=options), forward(model), timm.data.create_transform(**data))


def _own_pooling(model: torch.nn.Module) -> Forward:
    return lambda image: model.forward_head(model.forward_features(image), pre_logits=True)


def class_and_patches(model: torch.nn.Module) -> Forward:
    """Virchow2's: the class token beside the mean of what follows the registers."""

    def forward(image: torch.Tensor) -> torch.Tensor:
        tokens = model.forward_features(image)
        return torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], dim=-1)

    return forward


def _patches(model: torch.nn.Module) -> Forward:
    return lambda image: model.forward_features(image)[:, 1:].mean(1)


VIRCHOW2 = {"reg_tokens": 4, "mlp_layer": "SwiGLUPacked", "act_layer": "silu", "global_pool": "", "init_values": 1e-5}

TIMM: dict[str, Callable[[Path], Encoder]] = {
    "class token": lambda folder: timm_folder(folder, "test_vit", _own_pooling),
    "named class token": lambda folder: timm_folder(folder, "test_vit", _own_pooling, pooling="class"),
    "mean": lambda folder: timm_folder(folder, "test_vit", _patches, pooling="mean"),
    "virchow2": lambda folder: timm_folder(
        folder, "test_vit", class_and_patches, pooling="class_mean", model_args=VIRCHOW2
    ),
    "attention pool": lambda folder: timm_folder(
        folder, "test_vit", _own_pooling, model_args={"global_pool": "map", "class_token": False}
    ),
    "convolutions": lambda folder: timm_folder(folder, "test_convnext", _own_pooling, transform={"crop_pct": 1.0}),
    "uni": lambda folder: timm_folder(
        folder, "test_vit", _own_pooling, old=True, model_args={"init_values": 1e-5, "num_classes": 0},
        transform={"interpolation": "bilinear", "crop_pct": 1},
    ),
    "squash": lambda folder: timm_folder(
        folder, "test_vit", _own_pooling, transform={"crop_mode": "squash", "crop_pct": 1.0}
    ),
}  # fmt: skip

_TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip


def transformers_folder(folder: Path, kind: str, task: str, pooled: str, **given: object) -> Encoder:
    """An image tower of transformers, saved from the class `task`; `pooled`: its output by hand, as an expression."""
    options = dict(given)
    processor = dict(options.pop("processor", BIT))  # type: ignore[call-overload]
    changes = dict(options.pop("config", {}))  # type: ignore[call-overload]
    config = transformers.AutoConfig.for_model(kind, **(_TINY | changes))
    whole = loud(getattr(transformers, task)(config), 6)
    whole.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tower = getattr(whole, whole.base_model_prefix, whole) if "For" in task else whole

    def forward(image: torch.Tensor) -> torch.Tensor:
        more = {}
        if kind == "vit_mae":  # hide nothing, in the order that it is
            tower.config.mask_ratio, more = 0.0, {"noise": torch.arange(4.0).expand(len(image), -1)}
        o = tower(pixel_values=image, **more)
        h = o.last_hidden_state
        return {
            "class": h[:, 0],
            "pooler": getattr(o, "pooler_output", None),
            "mean": h[:, 1:].mean(1),
            "all": h.mean(1),
            "class and patches after four registers": torch.cat([h[:, 0], h[:, 5:].mean(1)], 1),
        }[pooled]  # type: ignore[return-value]

    pil = transformers.BitImageProcessorPil if processor is BIT or "crop_size" in processor else None
    make = pil or transformers.ViTImageProcessorPil
    settings = {name: value for name, value in processor.items() if not name.endswith("_type")}
    if isinstance(settings["size"], int):
        settings["size"] = {"height": settings["size"], "width": settings["size"]}
    process = make(**settings)
    return Encoder(
        spec_of("mine", folder, "auto", options=options),
        forward,
        lambda picture: torch.from_numpy(process(picture, return_tensors="np")["pixel_values"][0]),
    )


TOWERS: dict[str, Callable[[Path], Encoder]] = {
    "dinov2": lambda folder: transformers_folder(folder, "dinov2", "Dinov2Model", "class"),
    "dinov2, class and mean": lambda folder: transformers_folder(
        folder, "dinov2_with_registers", "Dinov2WithRegistersModel", "class and patches after four registers",
        pooling="class_mean",
    ),
    "dinov2 with a classifier": lambda folder: transformers_folder(
        folder, "dinov2", "Dinov2ForImageClassification", "mean", pooling="mean"
    ),
    "dinov3": lambda folder: transformers_folder(
        folder, "dinov3_vit", "DINOv3ViTModel", "class", config={"num_register_tokens": 4},
        processor=IMAGENET | {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True,
                              "size": {"height": 32, "width": 32}, "resample": 2, "do_normalize": True},
    ),
    "siglip": lambda folder: transformers_folder(folder, "siglip_vision_model", "SiglipVisionModel", "pooler"),
    "siglip, mean": lambda folder: transformers_folder(
        folder, "siglip_vision_model", "SiglipVisionModel", "all", pooling="mean"
    ),
    "clip": lambda folder: transformers_folder(folder, "clip_vision_model", "CLIPVisionModel", "pooler"),
    "vit": lambda folder: transformers_folder(folder, "vit", "ViTModel", "class", pooling="class", processor=VIT),
    "vit, dense": lambda folder: transformers_folder(folder, "vit", "ViTModel", "pooler", pooling="model"),
    "vit with a classifier": lambda folder: transformers_folder(
        folder, "vit", "ViTForImageClassification", "mean", pooling="mean", processor=VIT
    ),
    "vit_mae": lambda folder: transformers_folder(
        folder, "vit_mae", "ViTMAEForPreTraining", "class", pooling="class", processor=VIT,
        config={"decoder_hidden_size": 32, "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 1,
                "decoder_num_attention_heads": 2},
    ),
}  # fmt: skip

_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40,
    "max_position_embeddings": 66, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "type_vocab_size": 2,
    "cls_token_id": 2, "sep_token_id": 3, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
}  # fmt: skip


def text_folder(folder: Path, kind: str, task: str, pooling: str) -> Encoder:
    """A text tower of transformers, saved from the class `task`."""
    given = {name: _TEXT[name] for name in ("dim", "n_layers", "n_heads", "hidden_dim")} if kind == "distilbert" else {}
    names = [name for name in _TEXT if name not in ("dim", "n_layers", "n_heads", "hidden_dim")]
    config = transformers.AutoConfig.for_model(kind, **({name: _TEXT[name] for name in names} | given))
    whole = loud(getattr(transformers, task)(config), 7)
    whole.save_pretrained(folder)
    write_bert_tokenizer(folder)
    if kind == "modernbert":  # whose tokenizers are always in one file
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    tower = getattr(whole, whole.base_model_prefix) if "For" in task else whole

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in tokens:  # each caption alone, without padding
            ids = row[row != 0][None]
            output = tower(input_ids=ids, attention_mask=torch.ones_like(ids))
            states = output.last_hidden_state
            pooled = {"class": states[:, 0], "mean": states.mean(1)}
            rows.append(output.pooler_output if pooling == "model" else pooled[pooling])
        return torch.cat(rows)

    return Encoder(spec_of("mine", folder, "auto", options={"pooling": pooling}, context_length=48), forward)


TEXTS: dict[str, Callable[[Path], Encoder]] = {
    "bert, mean": lambda folder: text_folder(folder, "bert", "BertModel", "mean"),
    "bert, dense": lambda folder: text_folder(folder, "bert", "BertModel", "model"),
    "bert of pretraining": lambda folder: text_folder(folder, "bert", "BertForPreTraining", "class"),
    "masked bert": lambda folder: text_folder(folder, "bert", "BertForMaskedLM", "mean"),
    "roberta": lambda folder: text_folder(folder, "roberta", "RobertaForMaskedLM", "mean"),
    "xlm-roberta": lambda folder: text_folder(folder, "xlm-roberta", "XLMRobertaModel", "class"),
    "mpnet": lambda folder: text_folder(folder, "mpnet", "MPNetModel", "mean"),
    "distilbert": lambda folder: text_folder(folder, "distilbert", "DistilBertModel", "class"),
    "electra": lambda folder: text_folder(folder, "electra", "ElectraModel", "class"),
    "modernbert": lambda folder: text_folder(folder, "modernbert", "ModernBertForMaskedLM", "mean"),
}
