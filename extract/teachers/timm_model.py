"""Loader `timm`: an image tower as timm writes it to the hub (config.json with `architecture` and `pretrained_cfg`
beside the weights), or an architecture by name and a checkpoint."""

import functools
import math
from typing import Any

import timm
import torch
from pydantic import BaseModel, Field, JsonValue
from timm.data import resolve_data_config
from torch import nn

from mmkd.base.errors import did_you_mean, faults_as
from mmkd.base.images.resampling import FILTERS
from mmkd.extract.teachers.loaded import Pooling, pool_tokens
from mmkd.extract.teachers.loaders import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import read_json, source_of, weight_files
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.weights import load_strictly, read_weights
from mmkd.store import Preprocessing

_CONFIG = "config.json"


class TimmOptions(BaseModel, frozen=True, extra="forbid"):
    architecture: str = ""
    """A name that `timm.list_models()` has; empty: that of config.json."""
    model_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the architecture, laid over those of config.json; `mlp_layer` is a class of timm.layers by name."""
    pooling: Pooling = "model"


class TimmTower(nn.Module):
    """An image tower of timm behind `encode_image`."""

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model: Any = model
        self._pooling = pooling

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Encode float32 (B, 3, H, W); returns (B, D)."""
        if self._pooling == "model":
            return self.model(image)
        return pool_tokens(self.model.forward_features(image), self._pooling, self.model.num_prefix_tokens)


def _plan(spec: TeacherSpec) -> Plan:
    options, source = read_options(spec, TimmOptions), source_of(spec)
    path = source.find(_CONFIG) if options.architecture else source.need(_CONFIG)
    config = read_json(path) if path is not None else {}
    architecture = options.architecture or str(config.get("architecture"))
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models(), "see timm.list_models()")
        raise spec.error(f"timm {timm.__version__} has no architecture {architecture!r}; {hint}")
    # The first configurations on the hub were the pretrained_cfg alone.
    published = config.get("pretrained_cfg", config) or timm.get_pretrained_cfg(architecture).to_dict()
    arguments = (config.get("model_args") or {}) | options.model_args | {"num_classes": 0}
    settings = {"architecture": architecture, "arguments": arguments, "pooling": options.pooling}
    with torch.device("meta"):  # which costs no memory: to know the width
        model = _create(spec, architecture, arguments, config.get("pretrained_cfg"))
    # What is normalized after the pooling was not meant to be pooled otherwise.
    tokens = hasattr(model, "num_prefix_tokens") and isinstance(getattr(model, "fc_norm", None), nn.Identity | None)
    classless = "class" in options.pooling and getattr(model, "cls_token", None) is None
    if options.pooling != "model" and (classless or not tokens):
        problem = "this model has no class token, no tokens at all, or normalizes them after its own pooling"
        raise spec.error(f"options.pooling is {options.pooling!r}, but {problem}; leave it out for the model's own")
    return Plan(
        spec=spec,
        loader="timm",
        weights=weight_files(spec),
        preprocessing=spec.preprocessing or _preprocessing(spec, published),
        tokenizer=None,
        dim=model.head_hidden_size * (2 if options.pooling == "class_mean" else 1),
        configuration=settings,
        companions={_CONFIG: path} if path is not None else {},
        material=settings | {"pretrained_cfg": config.get("pretrained_cfg")},
    )


def _create(spec: TeacherSpec, architecture: str, arguments: dict[str, Any], pretrained_cfg: Any) -> Any:
    """Return the model with random weights. Raises TeacherError if timm refuses an argument."""
    layer = arguments.get("mlp_layer")
    if isinstance(layer, str):
        found = getattr(timm.layers, layer, None)
        if not isinstance(found, type | functools.partial):
            raise spec.error(f"model_args.mlp_layer is {layer!r}, no class of timm.layers such as SwiGLUPacked")
        arguments = arguments | {"mlp_layer": found}
    fault = f"timm cannot build {architecture} with {arguments}"
    errors = (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError)
    with faults_as(spec.error, errors, fault, "; correct options.model_args"):
        return timm.create_model(architecture, pretrained=False, pretrained_cfg=pretrained_cfg, **arguments)


def _preprocessing(spec: TeacherSpec, config: dict[str, Any]) -> Preprocessing:
    """Return timm's evaluation transform. Source: timm.data, resolve_data_config and transforms_imagenet_eval."""
    data = resolve_data_config({}, pretrained_cfg=config)
    channels, *size = data["input_size"]
    resized = [math.floor(side / data["crop_pct"]) for side in size]
    mode = {"center": "shortest", "squash": "squash"}.get(data["crop_mode"])
    fits = size[0] == size[1] if mode == "shortest" else resized == size
    if mode is None or not fits or channels != 3 or data["interpolation"] not in FILTERS:
        names = ("input_size", "crop_mode", "crop_pct", "interpolation")
        raise spec.error(
            f"timm's transform has {', '.join(f'{name} {data[name]}' for name in names)}, which mmkd does not do "
            "exactly; give 'preprocessing' in a YAML card"
        )
    return Preprocessing(
        image_size=tuple(size),
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        resize_mode=mode,
        resize=resized[0] if resized != size else 0,
    )


def _build(plan: Plan) -> nn.Module:
    material = plan.material
    model = _create(plan.spec, material["architecture"], material["arguments"], material["pretrained_cfg"])
    weights = read_weights(*plan.weights.values(), trust_pickle=plan.spec.trust_pickle)
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    own = model.state_dict()
    kept = {name: tensor for name, tensor in weights.items() if name in own or not name.startswith(heads)}
    load_strictly(model, kept, plan.where)
    return TimmTower(model, material["pooling"])


LOADER = FileLoader(
    plan=_plan,
    build=_build,
    recognizes=lambda spec, source, config: isinstance(config.get("architecture"), str),
    reads="a timm folder",
)
