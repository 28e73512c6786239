"""Loader `medclip`: Swin or ResNet-50 beside Bio_ClinicalBERT, re-stated from the authors' forward pass. Source:
github.com/RyanWangZf/MedCLIP, medclip/modeling_medclip.py (MedCLIPTextModel, MedCLIPVisionModel,
MedCLIPVisionModelViT), medclip/dataset.py and medclip/constants.py. Features here are before its normalization."""

from typing import Any, Literal

import torch
import torchvision
import transformers
from pydantic import BaseModel, Field, JsonValue
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.hugging_face import bert_tower, build_strictly, forward_settings, make_config
from mmkd.extract.teachers.loaders import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import weight_files
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.weights import load_strictly, misfits, read_weights
from mmkd.store import Preprocessing

TEXT_TOWER = "emilyalsentzer/Bio_ClinicalBERT"
_WEIGHTS = ("pytorch_model.bin", "model.safetensors")
# medclip/constants.py: IMG_MEAN, IMG_STD, over chest X-rays of one channel.
_MEAN, _STD = 0.5862785803043838, 0.27950088968644304


class MedClipOptions(BaseModel, frozen=True, extra="forbid"):
    """Choice of the released model and of the behavior where the authors' code depends on the batch."""

    image_tower: Literal["swin", "resnet50"] = "swin"
    swin: dict[str, JsonValue] = Field(default_factory=dict)
    """Differences from microsoft/swin-tiny-patch4-window7-224, whose values are SwinConfig's defaults."""
    pooled_tokens: Literal["caption", "context"] = "caption"
    """Tokens in the mean. The authors pad to the longest caption of the batch and average padding too, so a caption's
    feature depends on its neighbors; `caption` is what they get for a caption alone, `context` for one of 77."""
    dim: int = 512


class MedClipTowers(nn.Module):
    """Both towers with the authors' names, so that their weights load as they are. `vision`: pixels to pooled features
    (Swin), or to projected ones (ResNet, without `vision_projection`). `bert`: transformers' BertModel."""

    def __init__(
        self, vision: nn.Module, vision_projection: nn.Linear | None, bert: Any, options: MedClipOptions
    ) -> None:
        super().__init__()
        self.vision: Any = vision
        self.vision_projection = vision_projection
        self.bert: Any = bert
        self.text_projection = nn.Linear(self.bert.config.hidden_size, options.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self._options = options

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Encode float32 (B, 3, H, W); returns (B, D)."""
        if self.vision_projection is None:
            return self.vision(image)
        return self.vision_projection(self.vision(pixel_values=image).pooler_output)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Encode int64 (B, L); returns (B, D)."""
        mask = text != self.bert.config.pad_token_id
        states = self.bert(input_ids=text, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        layers = torch.stack([states[layer] for layer in (1, 2, -1)])  # (3, B, L, width); 0 is the embedding
        counted = (mask if self._options.pooled_tokens == "caption" else torch.ones_like(mask)).to(layers.dtype)
        tokens = (layers * counted[None, :, :, None]).sum(2) / counted.sum(1)[None, :, None]
        return self.text_projection(tokens.mean(0))


def _plan(spec: TeacherSpec) -> Plan:
    options = read_options(spec, MedClipOptions)
    bert, tokenizer = bert_tower(spec, TEXT_TOWER, inert_padding=options.pooled_tokens == "caption")
    forward = forward_settings(bert)
    size = int(str(options.swin.get("image_size", 224)))
    return Plan(
        spec=spec,
        loader="medclip",
        weights=weight_files(spec, _WEIGHTS),
        preprocessing=spec.preprocessing
        or Preprocessing(image_size=(size, size), mean=(_MEAN,), std=(_STD,), resize_mode="pad_square", color="L"),
        tokenizer=tokenizer,
        dim=options.dim,
        vocabulary=int(forward["vocab_size"]),
        configuration={"bert": forward} | options.model_dump(exclude={"dim"}),
        text_config=bert,
    )


def _build(plan: Plan) -> nn.Module:
    options = read_options(plan.spec, MedClipOptions)
    (path,) = plan.weights.values()
    weights = read_weights(path, trust_pickle=plan.spec.trust_pickle)
    prefixes = ("vision_model.model.", "text_model.model.")
    vision_weights, bert_weights = (
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        for prefix in prefixes
    )
    config = make_config(plan.spec, plan.text_config)
    bert = build_strictly(transformers.BertModel, config, bert_weights, f"{path} (text tower)")
    vision_projection: nn.Linear | None = None
    where = f"{path} (image tower)"
    if options.image_tower == "resnet50":
        vision: nn.Module = torchvision.models.resnet50(weights=None)
        vision.fc = nn.Linear(2048, options.dim, bias=False)
        load_strictly(vision, vision_weights, where)
    else:
        swin = transformers.SwinConfig(**options.swin)
        vision = build_strictly(transformers.SwinModel, swin, vision_weights, where)
        vision_projection = nn.Linear(swin.hidden_size, options.dim, bias=False)
    towers = MedClipTowers(vision, vision_projection, bert, options)
    heads = {"text_model.projection_head.weight": towers.text_projection.weight, "logit_scale": towers.logit_scale}
    if vision_projection is not None:
        heads["vision_model.projection_head.weight"] = vision_projection.weight
    given = {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}
    if problems := misfits(heads, given):
        raise TeacherError(f"{path} is not a MedCLIP checkpoint of this image tower: {problems}")
    with torch.no_grad():
        for name, own in heads.items():
            own.copy_(given[name])
    return towers


LOADER = FileLoader(plan=_plan, build=_build)
