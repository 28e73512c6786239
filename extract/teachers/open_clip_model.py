"""Loader `open_clip`: a folder or repository with open_clip_config.json, or an architecture by name and a checkpoint.
The second form with renamed keys also reads what forks of open_clip write (`text_encoder.` for `text.`)."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg
from open_clip.transformer import text_global_pool
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.hugging_face import forward_settings, text_config
from mmkd.extract.teachers.plan import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import Source, read_json, source_of, tokenizer_folder, weight_files
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
# Written by older transformers into the checkpoint; the newer ones compute it.
_SURPLUS = ("text.transformer.embeddings.position_ids",)
# Keys of text_cfg in configurations written by open_clip before 2.20.
_OLD_KEYS = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}
# Neither changes a feature: one is the source of weights, the other is for the loss.
_IRRELEVANT = {
    "timm_model_pretrained", "hf_model_pretrained", "hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs",
    "patch_dropout",
}  # fmt: skip


_PREPROCESS = {field.name for field in dataclasses.fields(PreprocessCfg)}


class OpenClipOptions(BaseModel):
    """Switches of the loader."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        preprocessing=spec.preprocessing or _preprocessing(preprocess, model["vision_cfg"].get("image_size", 224)),
        tokenizer=_tokenizer(spec, text, forward, bool(model.get("custom_text"))),
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
        model = open_clip.get_model_config(options.architecture)
        if model is None:
            near = difflib.get_close_matches(options.architecture, open_clip.list_models(), 1)
            hint = f"did you mean {near[0]!r}?" if near else "see open_clip.list_models()"
            raise TeacherError(f"teacher {spec.slug!r}: open_clip has no architecture {options.architecture!r}; {hint}")
    else:
        content = read_json(source_of(spec).need(_CONFIG))
        model = copy.deepcopy(content.get("model_cfg", content))
        preprocess = dict(cast(dict[str, Any], content.get("preprocess_cfg") or {}))
    _lay_over(model, options.model)
    missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in model]
    if missing:
        raise TeacherError(
            f"teacher {spec.slug!r}: the configuration at {spec.source} lacks {', '.join(missing)}: not open_clip's"
        )
    if model["text_cfg"].get("hf_model_name"):
        model["text_cfg"] = {_OLD_KEYS.get(name, name): value for name, value in model["text_cfg"].items()}
    if "multimodal_cfg" in model:
        raise TeacherError(
            f"teacher {spec.slug!r}: a CoCa model captions as well as encodes; write an encoder of your own for it"
        )
    return model, preprocess


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), dict):
            _lay_over(below[name], value)
        else:
            below[name] = copy.deepcopy(value)


def _settings(spec: TeacherSpec, model: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `model_cfg` that changes a feature, without what equals open_clip's default. Raises
    TeacherError for a key that the installed open_clip does not know."""
    settings = {name: value for name, value in model.items() if name not in ("vision_cfg", "text_cfg")}
    for section, defaults in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        known = {field.name: field.default for field in dataclasses.fields(defaults)}
        unknown = sorted(set(model[section]) - set(known))
        if unknown:
            raise TeacherError(
                f"teacher {spec.slug!r}: {section} has {', '.join(unknown)}, which open_clip "
                f"{open_clip.__version__} does not know; "
                "take a newer revision of the repository, or correct it with options.model"
            )
        settings[section] = {
            name: value for name, value in model[section].items() if value != known[name] and name not in _IRRELEVANT
        }
    return settings


def _preprocessing(config: dict[str, Any], image_size: int | list[int]) -> Preprocessing:
    # The model's size wins over the one in preprocess_cfg, as in open_clip.create_model.
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    given = PreprocessCfg(
        **{name: value for name, value in config.items() if value is not None and name in _PREPROCESS}
    )
    mean, std = (tuple(v) if isinstance(v, list | tuple) else (v,) * 3 for v in (given.mean, given.std))
    return Preprocessing(
        image_size=(height, width),
        mean=mean,
        std=std,
        interpolation=given.interpolation,
        resize_mode=given.resize_mode,
        fill=given.fill_color,
    )


def _tokenizer(spec: TeacherSpec, text: dict[str, Any], forward: dict[str, Any], custom: bool) -> TokenizerPlan:
    """As open_clip.get_tokenizer decides: a Hugging Face tokenizer when text_cfg names one, else CLIP's BPE."""
    context = spec.context_length or int(text.get("context_length") or CLIPTextCfg.context_length)
    settings = dict(text.get("tokenizer_kwargs") or {})
    clean = settings.pop("clean", None)
    inert = _padding_is_inert(custom, text, forward)
    if not text.get("hf_tokenizer_name"):
        return TokenizerPlan(context, clean=clean, settings=settings, kind="clip", inert_padding=inert)
    named = str(text["hf_tokenizer_name"])
    folder = tokenizer_folder(spec, named)
    reads_highest = not forward and text.get("pool_type", CLIPTextCfg.pool_type) == "argmax"
    return TokenizerPlan(
        context,
        folder=folder,
        clean=clean or "whitespace",
        mode=str(text.get("tokenizer_mode") or ""),
        settings=settings,
        kind="bert" if forward.get("model_type") == "bert" else "clip" if reads_highest else "words",
        pad_id=forward.get("pad_token_id"),
        inert_padding=inert,
    )


def _padding_is_inert(custom: bool, text: dict[str, Any], forward: dict[str, Any]) -> bool:
    """Return True if a caption may be cut after its end: see `TokenizerPlan.inert_padding`."""
    if forward:
        # open_clip's HFTextEncoder masks padding in the tower and in every pooler.
        return bool(forward.get("model_type") == "bert")
    default = all(text.get(name, False) is False for name in ("no_causal_mask", "embed_cls"))
    return default and not custom and text.get("pool_type", CLIPTextCfg.pool_type) == "argmax"


class Clip(CLIP):  # type: ignore[misc]  # open_clip has no type hints
    """open_clip's CLIP for captions that may be shorter than the context. Source: open_clip 3.3, CLIP.encode_text;
    positions and mask are cut to the length of the tokens."""

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Return int64 (B, L) to (B, D)."""
        length = text.shape[1]
        if length == self.context_length:
            whole: torch.Tensor = super().encode_text(text, normalize)
            return whole
        cast = self.transformer.get_cast_dtype()
        states = self.token_embedding(text).to(cast) + self.positional_embedding[:length].to(cast)
        states = self.ln_final(self.transformer(states, attn_mask=self.attn_mask[:length, :length]))
        pooled = text_global_pool(states, text, self.text_pool_type, eos_token_id=self.text_eos_id)
        projection = self.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        features: torch.Tensor = F.normalize(pooled, dim=-1) if normalize else pooled
        return features


def _build(plan: Plan) -> nn.Module:
    """Return the model as open_clip.create_model builds it, minus every download, plus strictness."""
    model_cfg = copy.deepcopy(plan.material["model"])
    with tempfile.TemporaryDirectory() as folder:
        custom = _without_downloads(model_cfg, plan.text_config, Path(folder))
        kind = CustomTextCLIP if custom else Clip
        try:
            model = cast(nn.Module, kind(**model_cfg))
        except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TeacherError(
                f"teacher {plan.spec.slug!r}: open_clip cannot build its model_cfg ({reason})"
            ) from error
    weights = read_weights(*plan.weights.values(), trust_pickle=plan.spec.trust_pickle)
    where = ", ".join(str(path) for path in plan.weights.values())
    load_strictly(model, _as_open_clip_names(weights, model, plan.material["rename"]), where)
    if "timm_model_name" in model_cfg["vision_cfg"]:
        _check_size(plan, model)
    return model


def _check_size(plan: Plan, model: nn.Module) -> None:
    """Check the image size with one image: some timm towers take one size only. Raises TeacherError if the tower does
    not take the images that the configuration asks for."""
    height, width = plan.preprocessing.image_size
    try:
        with torch.inference_mode():
            cast(CLIP, model.eval()).encode_image(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TeacherError(
            f"teacher {plan.spec.slug!r}: its image tower does not take {height} x {width} pixels ({reason}); "
            "correct image_size in its configuration or card"
        ) from error


def _without_downloads(model_cfg: dict[str, Any], transformer: dict[str, Any], folder: Path) -> bool:
    """Change `model_cfg` so that building it reads nothing from the network; True for a text tower of its own class."""
    custom = bool(model_cfg.pop("custom_text", False)) or bool(transformer)
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False
    if transformer:
        # open_clip asks AutoConfig for this name even when the weights are local: give it a folder.
        (folder / "config.json").write_text(json.dumps(transformer), encoding="utf-8")
        model_cfg["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return custom


def _as_open_clip_names(weights: StateDict, model: nn.Module, rename: Mapping[str, str]) -> StateDict:
    named = {_renamed(name, rename): tensor for name, tensor in weights.items()}
    if "positional_embedding" in named and not hasattr(model, "positional_embedding"):
        named = convert_to_custom_text_state_dict(named)
    for name in _SURPLUS:
        named.pop(name, None)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if own is not None and name in named and named[name].numel() == own.numel():
            # () and (1,) are the same temperature.
            named[name] = named[name].reshape(own.shape)
    return named


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for old, new in rename.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _recognizes(spec: TeacherSpec, source: Source) -> bool:
    return "architecture" in spec.options or source.find(_CONFIG) is not None


LOADER = FileLoader(plan=_plan, build=_build, recognizes=_recognizes, reads="an open_clip folder")
