"""Loader `conch`: CONCH's two towers without its decoder, made of timm's and open_clip's parts. Source:
github.com/mahmoodlab/CONCH, conch/open_clip_custom (coca_model.py, vision_tower.py, conch_ViT-B-16.json)."""

from typing import Any

import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import AttentionalPooler, TextTransformer
from pydantic import BaseModel
from torch import nn

from mmkd.extract.teachers.loaders import FileLoader, Plan, read_options
from mmkd.extract.teachers.source import tokenizer_folder, weight_files
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import load_strictly, read_weights
from mmkd.store import Preprocessing

# The decoder of captions, and what pools an image for it.
_DECODER = ("text_decoder.", "visual.attn_pool_caption.", "visual.ln_caption.")
_SIZE, _VOCABULARY, _DIM = 448, 32007, 512
_CONTEXT = 127
"""Tokens of a caption; the class token stands behind them, at a place of its own."""


class ConchOptions(BaseModel, frozen=True, extra="forbid"):
    """Sizes of both towers; the defaults are the published model's."""

    width: int = 768
    layers: int = 12
    heads: int = 12


class ConchTowers(nn.Module):
    """Both towers with the authors' names, so that their weights load as they are."""

    def __init__(self, options: ConchOptions) -> None:
        super().__init__()
        width, heads, layers = options.width, options.heads, options.layers
        self.visual = nn.Module()
        self.visual.trunk = timm.models.VisionTransformer(
            _SIZE, embed_dim=width, depth=layers, num_heads=heads, num_classes=0, dynamic_img_size=True
        )
        self.visual.attn_pool_contrast = AttentionalPooler(_DIM, width, n_head=8, n_queries=1)
        self.visual.ln_contrast = nn.LayerNorm(_DIM)
        self.visual.proj_contrast = nn.Parameter(torch.zeros(_DIM, _DIM))
        self.text = TextTransformer(_CONTEXT, _VOCABULARY, width, heads, layers, output_dim=_DIM, embed_cls=True)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Encode float32 (B, 3, H, W); returns (B, D), projected, not normalized."""
        visual: Any = self.visual
        pooled = visual.attn_pool_contrast(visual.trunk.forward_features(image))[:, 0]
        return visual.ln_contrast(pooled) @ visual.proj_contrast

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Encode int64 (B, L), padded to the context; returns (B, D), projected, not normalized."""
        return self.text(text)


def _plan(spec: TeacherSpec) -> Plan:
    look = Preprocessing(image_size=(_SIZE, _SIZE), mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    # The repository on the hub has no tokenizer, and who wants images alone needs none.
    folder = tokenizer_folder(spec) if spec.towers != ("image",) else None
    return Plan(
        spec=spec,
        loader="conch",
        weights=weight_files(spec),
        preprocessing=spec.preprocessing or look,
        tokenizer=TokenizerPlan(_CONTEXT, folder, pad_id=0) if folder else None,
        dim=_DIM,
        vocabulary=_VOCABULARY,
        configuration=read_options(spec, ConchOptions).model_dump(),
    )


def _build(plan: Plan) -> nn.Module:
    weights = read_weights(*plan.weights.values(), trust_pickle=plan.spec.trust_pickle)
    towers = ConchTowers(read_options(plan.spec, ConchOptions))
    load_strictly(towers, {n: t for n, t in weights.items() if not n.startswith(_DECODER)}, plan.where)
    return towers


LOADER = FileLoader(_plan, _build)
