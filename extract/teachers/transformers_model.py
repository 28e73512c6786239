"""Loader `transformers`: a CLIPModel or SiglipModel, or one tower alone, as `save_pretrained` writes it."""

import inspect
import re
from typing import Any

import torch
import transformers
from pydantic import BaseModel
from torch import nn

from mmkd.extract.teachers.hugging_face import PREPROCESSORS, build_strictly, make_config, preprocessing_of
from mmkd.extract.teachers.loaded import Pooling, pool_tokens
from mmkd.extract.teachers.loaders import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import read_json, source_of, tokenizer_folder, weight_files
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import read_weights

_DUAL = ("clip", "siglip")
# SigLIP 2 of fixed size is saved as a `siglip`; this type is the one whose patches follow the picture.
_NAFLEX = "siglip2"
# Whose pooled output is what everybody uses; of the others the card says it.
_POOLED = ("dinov2", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model", "clip_vision_model")
_IMAGE = (*_POOLED, "vit", "vit_mae")
_TEXT = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "electra", "modernbert")
_KINDS = (*_DUAL, *_IMAGE, *_TEXT)
_CONFIG = "config.json"
# A CLIP text tower whose configuration says 2 reads the highest id instead: the first files had it wrong
# (transformers, modeling_clip.py).
_LEGACY_EOS = 2
_LONGEST = 512
"""Tokens that a caption is cut to, where the tower takes more and the card names no context."""
# What a checkpoint of a task has above its tower: classifiers, a masked autoencoder's decoder, language models.
_HEADS = re.compile(r"(classifier|decoder|cls|lm_head|generator_\w+|discriminator_\w+|vocab_\w+|head\.(dense|norm))\.")
_HEADS_AND_POOLER = re.compile(rf"{_HEADS.pattern}|(\w+\.)?pooler\.")
_HISTORY = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id")
"""Members of config.json that change no feature."""


class TransformersOptions(BaseModel, frozen=True, extra="forbid"):
    pooling: Pooling | None = None
    """Of one tower alone; None: the model's own, where it is what everybody uses."""


class TransformersTowers(nn.Module):
    """A dual encoder of transformers (`pooling` None), or one tower, behind one method for each tower. `prefix`: tokens
    before the patches of an image tower alone."""

    def __init__(self, model: nn.Module, pooling: Pooling | None, prefix: int) -> None:
        super().__init__()
        self.model: Any = model
        self._pooling, self._prefix = pooling, prefix

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Encode float32 (B, 3, H, W); returns (B, D), of a dual encoder projected, not normalized."""
        if self._pooling is None:
            return pooled(self.model.get_image_features(pixel_values=image))
        return pooled(self.model(pixel_values=image), self._pooling, self._prefix)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Encode int64 (B, L); returns (B, D), of a dual encoder projected. One tower alone masks padding."""
        if self._pooling is None:
            return pooled(self.model.get_text_features(input_ids=text))
        mask = text != self.model.config.pad_token_id
        return pooled(self.model(input_ids=text, attention_mask=mask.long()), self._pooling, mask)


def pooled(output: Any, pooling: Pooling = "model", counted: torch.Tensor | int = 0) -> torch.Tensor:
    """Return the features; those of a dual encoder are a tensor up to transformers 4, and pooled output from 5 on."""
    if pooling != "model":
        return pool_tokens(output.last_hidden_state, pooling, counted)
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _plan(spec: TeacherSpec) -> Plan:
    source = source_of(spec)
    content = read_json(source.need(_CONFIG))
    kind = str(content.get("model_type"))
    if kind == _NAFLEX:
        raise spec.error(
            "SigLIP 2 NaFlex, whose number of patches follows the picture, is not supported; "
            "take its checkpoint of one size, such as hf-hub:google/siglip2-base-patch16-224"
        )
    if kind not in _KINDS:
        raise spec.error(f"config.json has type {kind!r}; this loader reads {', '.join(_KINDS)}")
    # A masked autoencoder's encoder is a ViT; its own class would hide patches at random.
    config = make_config(spec, content | ({"model_type": "vit"} if kind == "vit_mae" else {}))
    model_class = transformers.MODEL_MAPPING[type(config)]
    pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    # A ViT may have learned its pooler; a masked autoencoder's files never hold one.
    pooling = _pooling(spec, kind, owns=kind in _POOLED or (pooler and kind != "vit_mae"))
    text = config.text_config if kind in _DUAL else config
    dim = config.projection_dim if kind == "clip" else getattr(text, "projection_size", None) or text.hidden_size
    if kind in _DUAL:
        settings = {"text": _forward_settings(text), "vision": _forward_settings(config.vision_config)}
    else:
        settings = {name: value for name, value in content.items() if name not in _HISTORY} | {"pooling": pooling}
    return Plan(
        spec=spec,
        loader="transformers",
        weights=weight_files(spec),
        preprocessing=None if kind in _TEXT else spec.preprocessing or preprocessing_of(spec, source),
        tokenizer=None if kind in _IMAGE else _tokenizer(spec, kind, text),
        dim=int(dim) * (2 if pooling == "class_mean" else 1),
        vocabulary=int(getattr(text, "vocab_size", 0)),
        configuration=settings | {"kind": kind},
        companions={name: source.need(name) for name in (_CONFIG, *PREPROCESSORS) if source.find(name) is not None},
        material={
            "config": config,
            "class": model_class,
            "pooling": pooling,
            "arguments": {"add_pooling_layer": pooling == "model"} if pooler else {},
            "prefix": 0 if kind == "siglip_vision_model" else 1 + (getattr(config, "num_register_tokens", 0) or 0),
        },
    )


def _forward_settings(config: Any) -> dict[str, Any]:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "layer_norm_eps", "eos_token_id", "image_size", "patch_size", "projection_size",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _pooling(spec: TeacherSpec, kind: str, owns: bool) -> Pooling | None:
    """Return the pooling, None for both towers. Raises TeacherError where the card has to name it, or names one that is
    not there."""
    asked = read_options(spec, TransformersOptions).pooling
    known = ["mean"] if kind == "siglip_vision_model" else ["class", "mean", "class_mean"] * (kind not in _DUAL)
    known += ["model"] * owns
    if asked in known or (asked is None and kind in _DUAL):
        return asked
    if asked is None and kind in _POOLED:
        return "model"
    problem = f"options.pooling is {asked!r}" if asked else "its authors' pooling is not in its files"
    raise spec.error(f"{problem}; write options.pooling of a {kind} in a YAML card: {', '.join(known)}")


def _tokenizer(spec: TeacherSpec, kind: str, text: Any) -> TokenizerPlan:
    eos, alone = getattr(text, "eos_token_id", None), kind in _TEXT
    reads_highest = kind == "clip" and eos == _LEGACY_EOS
    return TokenizerPlan(
        context_length=spec.context_length or min(_LONGEST, int(text.max_position_embeddings)),
        folder=tokenizer_folder(spec),
        kind="bert" if alone else "clip" if reads_highest else "words",
        eos_id=eos if kind == "clip" and not reads_highest else None,
        pad_id=text.pad_token_id if alone else None,
        inert_padding=kind != "siglip",
    )


def _build(plan: Plan) -> nn.Module:
    material, pooling = plan.material, plan.material["pooling"]
    weights = read_weights(*plan.weights.values(), trust_pickle=plan.spec.trust_pickle)
    if pooling is not None:
        unused = _HEADS if pooling == "model" else _HEADS_AND_POOLER
        weights = {name: tensor for name, tensor in weights.items() if not unused.match(name)}
    model = build_strictly(material["class"], material["config"], weights, plan.where, **material["arguments"])
    return TransformersTowers(model, pooling, material["prefix"])


LOADER = FileLoader(
    plan=_plan,
    build=_build,
    recognizes=lambda spec, source, config: config.get("model_type") in (*_KINDS, _NAFLEX),
    reads="a transformers CLIPModel, SiglipModel, image or text tower",
)
