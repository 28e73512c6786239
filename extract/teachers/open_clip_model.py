"""Loader `open_clip`: a folder or repository with open_clip_config.json, or an architecture by name and a checkpoint;
with renamed keys, also what forks of open_clip write (`text_encoder.` for `text.`)."""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg
from open_clip.transformer import text_global_pool
from pydantic import BaseModel, Field, JsonValue, ValidationError
from torch import nn

from mmkd.base.config import merged
from mmkd.base.errors import did_you_mean, faults_as
from mmkd.extract.teachers.hugging_face import forward_settings, text_config
from mmkd.extract.teachers.loaders import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import read_json, source_of, tokenizer_folder, weight_files
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import StateDict, load_strictly, read_weights
from mmkd.store import Preprocessing

WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
"""Names that open_clip itself looks for, in its order (open_clip/factory.py, _find_checkpoint_in_dir)."""

_CONFIG = "open_clip_config.json"
# Keys of text_cfg in configurations written by open_clip before 2.20.
_OLD_KEYS = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}
# Neither changes a feature: one is the source of weights, the other is for the loss.
_IRRELEVANT = {
    "timm_model_pretrained", "hf_model_pretrained", "hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs",
    "patch_dropout",
}  # fmt: skip


class OpenClipOptions(BaseModel, frozen=True, extra="forbid"):
    architecture: str = ""
    """A name that `open_clip.list_models()` has; empty: open_clip_config.json at the source."""
    model: dict[str, JsonValue] = Field(default_factory=dict)
    """Laid over the architecture's `model_cfg`, section by section."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Beginnings of keys in the checkpoint, and what open_clip calls them."""


def _plan(spec: TeacherSpec) -> Plan:
    options = read_options(spec, OpenClipOptions)
    model, preprocess = _configurations(spec, options)
    text = model["text_cfg"]
    tower = str(text.get("hf_model_name") or "")
    transformer = text_config(spec, tower) if tower else {}
    forward = forward_settings(transformer) if tower else {}
    return Plan(
        spec=spec,
        loader="open_clip",
        weights=weight_files(spec, WEIGHTS),
        preprocessing=spec.preprocessing
        or _preprocessing(spec, preprocess, model["vision_cfg"].get("image_size", 224)),
        tokenizer=_tokenizer(spec, model, forward),
        dim=int(model["embed_dim"]),
        vocabulary=int(forward["vocab_size"] if tower else text.get("vocab_size", CLIPTextCfg.vocab_size)),
        configuration={"model": _settings(spec, model), "transformer": forward, "rename": options.rename},
        companions={} if options.architecture else {_CONFIG: source_of(spec).need(_CONFIG)},
        text_config=transformer,
        material={"model": model, "rename": options.rename},
    )


def _configurations(spec: TeacherSpec, options: OpenClipOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg`, with the spec's changes laid over them."""
    preprocess: dict[str, Any] = {}
    if options.architecture:
        if (model := open_clip.get_model_config(options.architecture)) is None:
            hint = did_you_mean(options.architecture, open_clip.list_models(), "see open_clip.list_models()")
            raise spec.error(f"open_clip has no architecture {options.architecture!r}; {hint}")
    else:
        content = read_json(source_of(spec).need(_CONFIG))
        model = content.get("model_cfg", content)
        model = model if isinstance(model, dict) else {}
        preprocess = dict(content.get("preprocess_cfg") or {})
    model = merged(model, options.model)
    wanted = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    if missing := [name for name, kind in wanted.items() if not isinstance(model.get(name), kind)]:
        raise spec.error(f"the configuration at {spec.source} lacks {', '.join(missing)}: not open_clip's")
    if ":" in str(model["vision_cfg"].get("timm_model_name")):
        raise spec.error(
            f"vision_cfg.timm_model_name is {model['vision_cfg']['timm_model_name']!r}, whose "
            "architecture lies elsewhere; name a model that timm.list_models() has, with options.model"
        )
    if model["text_cfg"].get("hf_model_name"):
        model["text_cfg"] = {_OLD_KEYS.get(name, name): value for name, value in model["text_cfg"].items()}
    if "multimodal_cfg" in model:
        raise spec.error("a CoCa model captions as well as encodes; write an encoder of your own for it")
    return model, preprocess


def _settings(spec: TeacherSpec, model: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `model_cfg` that changes a feature, without what equals open_clip's default."""
    settings = {name: value for name, value in model.items() if name not in ("vision_cfg", "text_cfg")}
    for section, defaults in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        known = {field.name: field.default for field in dataclasses.fields(defaults)}
        if unknown := sorted(set(model[section]) - set(known)):
            raise spec.error(
                f"{section} has {', '.join(unknown)}, which open_clip {open_clip.__version__} does not know; "
                "take a newer revision of the repository, or correct it with options.model"
            )
        settings[section] = {
            name: value for name, value in model[section].items() if value != known[name] and name not in _IRRELEVANT
        }
    return settings


def _preprocessing(spec: TeacherSpec, config: dict[str, Any], image_size: int | list[int]) -> Preprocessing:
    known = {field.name for field in dataclasses.fields(PreprocessCfg)}
    given = PreprocessCfg(**{name: value for name, value in config.items() if value is not None and name in known})
    mean, std = (tuple(v) if isinstance(v, list | tuple) else (v,) * 3 for v in (given.mean, given.std))
    try:
        return Preprocessing(
            # The model's size wins over the one in preprocess_cfg, as in open_clip.create_model.
            image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
            mean=mean,
            std=std,
            interpolation=given.interpolation,
            resize_mode=given.resize_mode,
            fill=given.fill_color,
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise spec.error(
            f"{_CONFIG}: {name} is {first['input']!r}: {first['msg']}; give 'preprocessing' in a YAML card"
        ) from error


def _tokenizer(spec: TeacherSpec, model: dict[str, Any], forward: dict[str, Any]) -> TokenizerPlan:
    """Decide as open_clip.get_tokenizer: a Hugging Face tokenizer when text_cfg names one, else CLIP's BPE."""
    text = model["text_cfg"]
    reads_end = text.get("pool_type", CLIPTextCfg.pool_type) == "argmax" and not forward
    if forward:
        # open_clip's HFTextEncoder masks padding in the tower and in every pooler.
        inert = forward.get("model_type") == "bert"
    else:
        causal = all(text.get(name, False) is False for name in ("no_causal_mask", "embed_cls"))
        inert = reads_end and causal and not model.get("custom_text")
    context = spec.context_length or int(text.get("context_length") or CLIPTextCfg.context_length)
    settings = dict(text.get("tokenizer_kwargs") or {})
    clean = settings.pop("clean", None)
    if not text.get("hf_tokenizer_name"):
        return TokenizerPlan(context, clean=clean, settings=settings, kind="clip", inert_padding=inert)
    return TokenizerPlan(
        context,
        folder=tokenizer_folder(spec, str(text["hf_tokenizer_name"])),
        clean=clean or "whitespace",
        mode=str(text.get("tokenizer_mode") or ""),
        settings=settings,
        kind="bert" if forward.get("model_type") == "bert" else "clip" if reads_end else "words",
        pad_id=forward.get("pad_token_id"),
        inert_padding=inert,
    )


class Clip(CLIP):  # type: ignore[misc]  # open_clip has no type hints
    """open_clip's CLIP for captions that may be shorter than the context. Source: open_clip 3.3, CLIP.encode_text;
    positions and mask are cut to the length of the tokens."""

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Encode int64 (B, L); returns (B, D)."""
        length = text.shape[1]
        if length == self.context_length:
            return super().encode_text(text, normalize)
        cast = self.transformer.get_cast_dtype()
        states = self.token_embedding(text).to(cast) + self.positional_embedding[:length].to(cast)
        states = self.ln_final(self.transformer(states, attn_mask=self.attn_mask[:length, :length]))
        pooled = text_global_pool(states, text, self.text_pool_type, eos_token_id=self.text_eos_id)
        if (projection := self.text_projection) is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return F.normalize(pooled, dim=-1) if normalize else pooled


def _build(plan: Plan) -> nn.Module:
    """Return the model as open_clip.create_model builds it, minus every download, plus strictness."""
    model_cfg = copy.deepcopy(plan.material["model"])
    kind = CustomTextCLIP if model_cfg.pop("custom_text", False) or plan.text_config else Clip
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False
    with tempfile.TemporaryDirectory() as folder:
        if plan.text_config:
            # open_clip asks AutoConfig for this name even when the weights are local: give it a folder.
            Path(folder, "config.json").write_text(json.dumps(plan.text_config), encoding="utf-8")
            model_cfg["text_cfg"] |= {"hf_model_name": folder, "hf_model_pretrained": False}
        errors = (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError, OSError)
        with faults_as(plan.spec.error, errors, "open_clip cannot build its model_cfg"):
            model: nn.Module = kind(**model_cfg)
    weights = read_weights(*plan.weights.values(), trust_pickle=plan.spec.trust_pickle)
    load_strictly(model, _as_open_clip_names(weights, model, plan.material["rename"]), plan.where)
    return model


def _as_open_clip_names(weights: StateDict, model: nn.Module, rename: Mapping[str, str]) -> StateDict:
    named = {}
    for name, tensor in weights.items():
        old = next((old for old in rename if name.startswith(old)), "")
        named[rename.get(old, "") + name.removeprefix(old)] = tensor
    if "positional_embedding" in named and not hasattr(model, "positional_embedding"):
        named = convert_to_custom_text_state_dict(named)
    # Written by older transformers into the checkpoint; the newer ones compute it.
    named.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        if (own := getattr(model, name, None)) is not None and name in named and named[name].numel() == own.numel():
            named[name] = named[name].reshape(own.shape)  # () and (1,) are the same temperature
    return named


LOADER = FileLoader(
    plan=_plan,
    build=_build,
    recognizes=lambda spec, source, config: "architecture" in spec.options or source.find(_CONFIG) is not None,
    reads="an open_clip folder",
)
