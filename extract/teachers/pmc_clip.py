"""Loader `pmc_clip`: a ResNet with attention pooling beside a BERT whose [CLS] is projected by a bare matrix. Source:
github.com/WeixiongLin/PMC-CLIP, src/pmc_clip/model/pmc_clip.py (PMC_CLIP.encode_image, encode_text) and
model_configs/RN50_fusion4.json; the split files are those of the authors' quick start."""

import math
import re
from typing import Any, Literal

import torch
import transformers
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.modified_resnet import ModifiedResNet
from pydantic import BaseModel, Field
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.hugging_face import bert_tower, build_strictly, forward_settings, make_config
from mmkd.extract.teachers.loaders import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import weight_files
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.weights import BARE_TENSOR, StateDict, key_problems, load_strictly, read_weights
from mmkd.store import Preprocessing

SPLIT_FILES = ("image_encoder(resnet50).pth", "text_encoder.pth", "text_projection_layer.pth")
TEXT_TOWER = "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext"
# Parts of the full checkpoint that served the masked-language loss of training and make no feature.
_TRAINING_ONLY = re.compile(r"positional_embedding|ln_final\..*|mlm_projection|img_special_token|fusion_module\..*")


class PmcClipOptions(BaseModel, frozen=True, extra="forbid"):
    """The switches on which re-users of the weights disagree; the defaults are the training code's."""

    attention_pool_heads: int | None = Field(default=None, gt=0)
    """Heads of the image tower's attention pooling; empty: width * 32 / 64, 32 for a ResNet-50."""
    text_feature: Literal["last_hidden_state", "pooler_output"] = "last_hidden_state"
    attention_mask: bool = False
    """Mask padding in attention; the original training attended to it."""
    image_size: int = 224
    dim: int = 768


class PmcClipTowers(nn.Module):
    """Both towers; features as before the authors' normalization. `visual`: open_clip's ModifiedResNet. `bert`:
    transformers' BertModel. `projection`: (hidden width, D) matrix, applied from the right."""

    def __init__(self, visual: nn.Module, bert: nn.Module, projection: torch.Tensor, options: PmcClipOptions) -> None:
        super().__init__()
        self.visual = visual
        self.bert: Any = bert
        self.text_projection = nn.Parameter(projection)
        self._options = options

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Encode float32 (B, 3, H, W); returns (B, D)."""
        return self.visual(image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Encode int64 (B, L); returns (B, D)."""
        mask = (text != self.bert.config.pad_token_id).long() if self._options.attention_mask else torch.ones_like(text)
        output = self.bert(input_ids=text, attention_mask=mask)
        whole = self._options.text_feature == "pooler_output"
        pooled = output.pooler_output if whole else output.last_hidden_state[:, 0]
        return pooled @ self.text_projection


def _plan(spec: TeacherSpec) -> Plan:
    options = read_options(spec, PmcClipOptions)
    bert, tokenizer = bert_tower(spec, TEXT_TOWER, inert_padding=options.attention_mask)
    forward = forward_settings(bert)
    return Plan(
        spec=spec,
        loader="pmc_clip",
        weights=weight_files(spec, SPLIT_FILES, all_of_them=True),
        preprocessing=spec.preprocessing
        or Preprocessing(image_size=(options.image_size,) * 2, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD),
        tokenizer=tokenizer,
        dim=options.dim,
        vocabulary=int(forward["vocab_size"]),
        configuration={"bert": forward} | options.model_dump(exclude={"image_size", "dim"}),
        text_config=bert,
    )


def _build(plan: Plan) -> nn.Module:
    options = read_options(plan.spec, PmcClipOptions)
    files = [read_weights(path, trust_pickle=plan.spec.trust_pickle) for path in plan.weights.values()]
    if len(files) == len(SPLIT_FILES):
        image_weights, text_weights, projection = files[0], files[1], files[2][BARE_TENSOR]
    else:
        whole = {name: tensor for name, tensor in files[0].items() if not _TRAINING_ONLY.fullmatch(name)}
        image_weights, text_weights = (
            {name.removeprefix(prefix): whole.pop(name) for name in list(whole) if name.startswith(prefix)}
            for prefix in ("visual.", "text_encoder.")
        )
        heads = {"text_projection", "logit_scale"}
        if problems := key_problems(heads - set(whole), set(whole) - heads, ()):
            raise TeacherError(f"{plan.where} is not a PMC-CLIP checkpoint: {problems}")
        projection = whole["text_projection"]
    visual = _resnet(image_weights, options, plan.where)
    load_strictly(visual, image_weights, f"{plan.where} (image tower)")
    config = make_config(plan.spec, plan.text_config)
    bert = build_strictly(transformers.BertModel, config, text_weights, f"{plan.where} (text tower)")
    if projection.shape != (config.hidden_size, options.dim):
        raise TeacherError(
            f"{plan.where}: text projection is {tuple(projection.shape)}, expected "
            f"{(config.hidden_size, options.dim)}; these are another model's files, or options.dim is wrong"
        )
    return PmcClipTowers(visual, bert, projection, options)


def _resnet(weights: StateDict, options: PmcClipOptions, where: str) -> ModifiedResNet:
    """Return the image tower in the size that the weights have; only its heads leave no trace in them."""
    stem, position, output = (
        weights.get(name) for name in ("conv3.weight", "attnpool.positional_embedding", "attnpool.c_proj.weight")
    )
    if stem is None or position is None or output is None:
        raise TeacherError(f"{where} (image tower) is not a ResNet with attention pooling: no conv3 or no attnpool")
    width = stem.shape[0]
    layers = [
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    ]
    side = math.isqrt(position.shape[0] - 1) * 32
    if side != options.image_size or output.shape[0] != options.dim:
        raise TeacherError(
            f"{where} (image tower) is for {side} pixels and width {output.shape[0]}, expected "
            f"{options.image_size} and {options.dim}; "
            "these are another model's files, or options.image_size or options.dim is wrong"
        )
    return ModifiedResNet(
        layers=layers,
        output_dim=options.dim,
        heads=options.attention_pool_heads or width * 32 // 64,
        image_size=options.image_size,
        width=width,
    )


LOADER = FileLoader(plan=_plan, build=_build)
