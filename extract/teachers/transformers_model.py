"""Loader `transformers`: a CLIPModel or SiglipModel as `save_pretrained` writes it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator
from torch import nn

from mmkd.extract.teachers.hugging_face import build_strictly, make_config
from mmkd.extract.teachers.loaders import FileLoader, Plan, read_options
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


class TransformersOptions(BaseModel, extra="forbid"):
    """No options: config.json decides everything."""


class TransformersTowers(nn.Module):
    """A dual encoder of transformers behind two methods. `model`: has `get_image_features` and `get_text_features`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Encode float32 (B, 3, H, W); returns (B, D), projected, not normalized."""
        return projected(self.model.get_image_features(pixel_values=image))

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Encode int64 (B, L); returns (B, D), projected, not normalized."""
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
        raise spec.error(
            "SigLIP 2 NaFlex, whose number of patches follows the picture, is not supported; "
            "take its checkpoint of one size, such as hf-hub:google/siglip2-base-patch16-224"
        )
    if kind not in _CLASSES:
        raise spec.error(f"config.json has type {kind!r}; this loader reads {', '.join(_CLASSES)}")
    config = make_config(spec, content)
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


class _Edges(BaseModel):
    shortest_edge: int | None = None
    height: int | None = None
    width: int | None = None


class _ImageProcessor(BaseModel):
    """An image processor's configuration, in any form since CLIPFeatureExtractor."""

    size: _Edges = _Edges(shortest_edge=224)
    crop_size: _Edges | None = None
    do_center_crop: bool | None = None
    do_resize: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    resample: int | None = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @field_validator("size", "crop_size", mode="before")
    @classmethod
    def _edges(cls, value: object, field: ValidationInfo) -> object:
        if isinstance(value, int):
            return {"shortest_edge": value} if field.field_name == "size" else {"height": value, "width": value}
        if not isinstance(value, dict) and (value is not None or field.field_name == "size"):
            raise ValueError(f"is {value!r}, expected a number or edges by name")
        return value


def _preprocessing(spec: TeacherSpec, source: Source) -> Preprocessing:
    """Read the preprocessing of preprocessor_config.json or processor_config.json. Raises TeacherError if it is
    missing, or asks for something that this loader would not do exactly."""
    found = [read_json(path) for name in _PREPROCESSORS if (path := source.find(name)) is not None]
    # A processor_config.json of transformers 4 beside the other says nothing of images.
    contents = [one for one in found if "image_processor" in one or "image_mean" in one]
    if not contents:
        raise spec.error(f"{spec.source} has no {' or '.join(_PREPROCESSORS)}{source.listing()}")
    given = contents[0].get("image_processor") or contents[0]
    try:
        asked, *again = (_ImageProcessor.model_validate(one.get("image_processor") or one) for one in contents)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "image_processor"
        reason = first["msg"].removeprefix("Value error, ")
        raise spec.error(
            f"the image processor's configuration: {name}: {reason}; download it again, or give "
            "'preprocessing' in a YAML card"
        ) from error
    if again and again[0] != asked:
        raise spec.error(f"{' and '.join(_PREPROCESSORS)} of {spec.source} disagree; remove the one that is not meant")
    size, crop = asked.size, asked.crop_size or _Edges(height=224, width=224)
    cropped = asked.do_center_crop if "do_center_crop" in asked.model_fields_set else asked.crop_size is not None
    interpolation = _INTERPOLATIONS.get(asked.resample or 0)
    squashed = size.height is not None
    edges = size if squashed else crop
    height, width = edges.height or 0, edges.width or 0
    if squashed:
        fits = not cropped or (crop.height, crop.width) == (height, width)
    else:
        fits = bool(cropped) and size.shortest_edge == min(height, width)
    steps = asked.do_resize and asked.do_normalize and asked.do_rescale is not False
    if not (interpolation and fits and steps and abs(asked.rescale_factor * 255 - 1) < 1e-6):
        others = [f", {name} {given[name]}" for name in ("do_resize", "do_rescale", "do_normalize", "rescale_factor")
                  if name in given]  # fmt: skip
        raise spec.error(
            f"the image processor asks for size {given.get('size', 224)}, crop {given.get('crop_size', 224)}, resample "
            f"{given.get('resample')}{''.join(others)}, which mmkd does not do exactly; give 'preprocessing' in a YAML "
            "card"
        )
    return Preprocessing(
        image_size=(height, width),
        mean=asked.image_mean,
        std=asked.image_std,
        interpolation=interpolation,
        resize_mode="hf_squash" if squashed else "hf_shortest",
    )


def _build(plan: Plan) -> nn.Module:
    weights = read_weights(*plan.weights.values(), trust_pickle=plan.spec.trust_pickle)
    model_class = getattr(transformers, plan.material["class"])
    return TransformersTowers(build_strictly(model_class, plan.material["config"], weights, plan.where))


def _recognizes(spec: TeacherSpec, source: Source) -> bool:
    config = source.find(_CONFIG)
    return config is not None and read_json(config).get("model_type") in (*_CLASSES, _NAFLEX)


LOADER = FileLoader(_plan, _build, _recognizes, reads=f"a transformers {' or '.join(_CLASSES)} model")
