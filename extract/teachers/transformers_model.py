"""Loader `transformers`: a CLIPModel or SiglipModel as `save_pretrained` writes it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.hugging_face import build_strictly, make_config
from mmkd.extract.teachers.plan import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import Source, read_json, source_of, tokenizer_folder, weight_files
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import read_weights
from mmkd.store import Preprocessing

_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
# SigLIP 2 of fixed size is saved as a `siglip`; this type is the one whose patches follow the picture.
_NAFLEX = "siglip2"
_CONFIG = "config.json"
# Where transformers up to 4, and from 5 on, save what a processor does with images.
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# PIL's numbers, as preprocessor_config.json has them.
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
# A CLIP text tower whose configuration says 2 reads the highest id instead: the first files had it wrong
# (transformers, modeling_clip.py).
_LEGACY_EOS = 2


class TransformersOptions(BaseModel):
    """No options: config.json decides everything."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TransformersTowers(nn.Module):
    """A dual encoder of transformers behind two methods. `model`: has `get_image_features`, `get_text_features` and
    `logit_scale`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def logit_scale(self) -> torch.Tensor:
        """Logarithm of the temperature."""
        scale: torch.Tensor = self.model.logit_scale
        return scale

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return float32 (B, 3, H, W) to (B, D), projected, not normalized."""
        return projected(self.model.get_image_features(pixel_values=image))

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Return int64 (B, L) to (B, D), projected, not normalized."""
        return projected(self.model.get_text_features(input_ids=text))


def projected(output: Any) -> torch.Tensor:
    """Return the features: a tensor up to transformers 4, the pooled part of an output object from 5 on."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def _plan(spec: TeacherSpec) -> Plan:
    read_options(spec, TransformersOptions)
    source = source_of(spec)
    content = read_json(source.need(_CONFIG))
    kind = str(content.get("model_type"))
    if kind == _NAFLEX:
        raise TeacherError(
            f"teacher {spec.slug!r}: SigLIP 2 NaFlex, whose number of patches follows the picture, is not supported; "
            "take its checkpoint of one size, such as hf-hub:google/siglip2-base-patch16-224"
        )
    if kind not in _CLASSES:
        raise TeacherError(
            f"teacher {spec.slug!r}: config.json has type {kind!r}; this loader reads {', '.join(_CLASSES)}"
        )
    config = make_config(content, f"teacher {spec.slug!r}")
    text = config.text_config
    eos = text.eos_token_id
    return Plan(
        spec=spec,
        loader="transformers",
        weights=weight_files(spec, _WEIGHTS),
        preprocessing=spec.preprocessing or _preprocessing(spec, source),
        tokenizer=TokenizerPlan(
            context_length=spec.context_length or int(text.max_position_embeddings),
            folder=tokenizer_folder(spec),
            clean=None,
            kind="clip" if kind == "clip" and eos == _LEGACY_EOS else "words",
            eos_id=eos if kind == "clip" and eos != _LEGACY_EOS else None,
            inert_padding=kind == "clip",
        ),
        dim=int(
            config.projection_dim if kind == "clip" else getattr(text, "projection_size", None) or text.hidden_size
        ),
        vocabulary=int(text.vocab_size),
        configuration={
            "text": _forward_settings(text),
            "vision": _forward_settings(config.vision_config),
            "kind": kind,
        },
        companions={name: source.need(name) for name in (_CONFIG, *_PREPROCESSORS) if source.find(name) is not None},
        material={"config": config, "class": _CLASSES[kind]},
    )


def _forward_settings(config: Any) -> dict[str, Any]:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "layer_norm_eps", "eos_token_id", "image_size", "patch_size", "projection_size",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _preprocessing(spec: TeacherSpec, source: Source) -> Preprocessing:
    """Read the preprocessing of preprocessor_config.json or processor_config.json, in any form since
    CLIPFeatureExtractor. Raises TeacherError if it is missing, or asks for something that this loader would not do
    exactly."""
    found: list[dict[str, Any]] = [
        dict(read_json(path)) for name in _PREPROCESSORS if (path := source.find(name)) is not None
    ]
    # A processor_config.json of transformers 4 beside the other says nothing of images.
    content = next((one for one in found if "image_processor" in one or "image_mean" in one), None)
    if content is None:
        raise TeacherError(
            f"teacher {spec.slug!r}: {spec.source} has no {' or '.join(_PREPROCESSORS)}{source.listing()}"
        )
    content |= content.get("image_processor") or {}
    size, crop = content.get("size", 224), content.get("crop_size", 224)
    cropped = bool(content.get("do_center_crop", "crop_size" in content))
    interpolation = _INTERPOLATIONS.get(int(content.get("resample", 3)))
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    window = (crop, crop) if isinstance(crop, int) else (crop.get("height"), crop.get("width"))
    squashed = isinstance(size, dict) and "height" in size
    image_size = (size["height"], size["width"]) if squashed else window
    exact = interpolation and content.get("do_resize", True) and content.get("do_normalize", True)
    exact = exact and abs(float(content.get("rescale_factor", 1 / 255)) * 255 - 1) < 1e-6
    exact = exact and (not cropped or window == image_size if squashed else cropped and edge == min(image_size))
    if not exact:
        raise TeacherError(
            f"teacher {spec.slug!r}: the image processor asks for size {size}, crop {crop}, "
            f"resample {content.get('resample')}, which mmkd does not do exactly; give 'preprocessing' in a YAML card"
        )
    return Preprocessing(
        image_size=(int(image_size[0]), int(image_size[1])),
        mean=tuple(content["image_mean"]),
        std=tuple(content["image_std"]),
        interpolation=str(interpolation),
        resize_mode="hf_squash" if squashed else "hf_shortest",
    )


def _build(plan: Plan) -> nn.Module:
    weights = read_weights(*plan.weights.values(), trust_pickle=plan.spec.trust_pickle)
    where = ", ".join(str(path) for path in plan.weights.values())
    model_class = getattr(transformers, plan.material["class"])
    return TransformersTowers(build_strictly(model_class, plan.material["config"], weights, where))


def _recognizes(spec: TeacherSpec, source: Source) -> bool:
    config = source.find(_CONFIG)
    return config is not None and read_json(config).get("model_type") in (*_CLASSES, _NAFLEX)


LOADER = FileLoader(
    plan=_plan, build=_build, recognizes=_recognizes, reads=f"a transformers {' or '.join(_CLASSES)} model"
)
