"""The original's published features of its own demo samples, against which real weights can be told right from wrong.

Layout (github.com/wangshansong1/MMKD-CLIP, MMKDCLIP_DATA): `meta.jsonl`, one sample a line with `imgpath`, `txt` and
`available_clips`; beside each picture `clips_output.pt` with unit-norm float32 vectors `<Name>_img` and `<Name>_txt`.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.geometry import geometry_of, pixel_transform
from mmkd.extract.teachers.protocol import Teacher
from mmkd.extract.teachers.published import find_published

SAME = 0.999
"""Cosine above which two features are the same model's: half-precision inference costs about 1e-4."""


@dataclass(frozen=True)
class GoldenSample:
    """One published sample with the features of one teacher."""

    key: str
    image: Path
    caption: str
    image_feature: torch.Tensor
    """float32 (D,), unit norm."""
    text_feature: torch.Tensor


@dataclass(frozen=True)
class GoldenCosine:
    """How close our features of a published sample are to the published ones."""

    key: str
    image: float
    text: float


def read_golden(folder: Path, slug: str) -> list[GoldenSample]:
    """The samples that have features of this teacher, under any of its spellings.

    Raises:
        TeacherError: not the original's layout.
    """
    published = find_published(slug, missing_ok=True)
    spellings = {slug, *((published.name, *published.also_called) if published else ())}
    lines = _lines(folder / "meta.jsonl")
    samples = []
    for line in lines:
        try:
            key, image, caption = str(line["id"]), folder / str(line["imgpath"]), str(line["txt"])
        except KeyError as error:
            raise TeacherError(
                f"{folder / 'meta.jsonl'} has a line without {error}; expected id, imgpath, txt"
            ) from error
        if not image.is_file():
            # Copies of the release may hold some of its samples only.
            continue
        features = _features(image.parent / "clips_output.pt")
        named = {name.removesuffix("_img") for name in features if name.endswith("_img")} & spellings
        for name in sorted(named):
            samples.append(GoldenSample(key, image, caption, features[f"{name}_img"], features[f"{name}_txt"]))  # noqa: PERF401
    return samples


def golden_cosines(teacher: Teacher, samples: list[GoldenSample]) -> list[GoldenCosine]:
    """Run the teacher on published samples.

    Raises:
        TeacherError: the published features have another width.
    """
    transform = pixel_transform(geometry_of(teacher.card.preprocessing))
    cosines = []
    for sample in samples:
        if sample.image_feature.numel() != teacher.card.dim:
            raise TeacherError(
                f"teacher {teacher.card.slug!r} has width {teacher.card.dim}, its published features "
                f"{sample.image_feature.numel()}: another variant was used; see `mmkd teachers list`"
            )
        with Image.open(sample.image) as picture:
            pixels = torch.from_numpy(transform(picture))[None].to(teacher.device)
        tokens, _ = teacher.tokenize([sample.caption])
        image = teacher.encode_images(pixels)[0].cpu()
        text = teacher.encode_texts(tokens.to(teacher.device))[0].cpu()
        cosines.append(
            GoldenCosine(
                sample.key,
                image=float(torch.cosine_similarity(image, sample.image_feature, dim=0)),
                text=float(torch.cosine_similarity(text, sample.text_feature, dim=0)),
            )
        )
    return cosines


def _lines(path: Path) -> list[dict[str, object]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"cannot read {path} ({error}); --golden wants the original's folder with meta.jsonl"
        ) from error


def _features(path: Path) -> dict[str, torch.Tensor]:
    try:
        content: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TeacherError(f"cannot read {path} ({' '.join(str(error).split())[:120]})") from error
    return content
