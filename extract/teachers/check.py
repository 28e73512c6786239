"""`mmkd teachers check`: load a teacher for real, run it, and say what came out."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from mmkd.extract.teachers.geometry import geometry_of, pixel_transform
from mmkd.extract.teachers.golden import SAME, GoldenSample, golden_cosines, read_golden
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.extract.teachers.loaders import find_loader
from mmkd.extract.teachers.protocol import Teacher
from mmkd.extract.teachers.published import find_published
from mmkd.extract.teachers.sample_images import CAPTIONS, drawn_pictures, pictures_in
from mmkd.extract.teachers.spec import Precision, TeacherSpec

_FLOAT16_MAX = 65504.0


class TowerReport(BaseModel):
    """One tower's output on the pictures or captions."""

    model_config = ConfigDict(frozen=True)

    inputs: int
    norm_smallest: float
    norm_largest: float
    not_finite: int
    """Rows with NaN or infinity."""
    beyond_float16: int
    """Rows that a store, which keeps float16, cannot hold."""
    not_finite_in_half: dict[str, int]
    """The same rows counted under autocast, by precision; empty for another package's encoder."""
    per_second: float


class GoldenReport(BaseModel):
    """Comparison with the original's published features."""

    model_config = ConfigDict(frozen=True)

    samples: int
    smallest_image_cosine: float | None
    smallest_text_cosine: float | None
    verdict: str


class CheckReport(BaseModel):
    """What `check` found."""

    model_config = ConfigDict(frozen=True)

    slug: str
    source: str
    digest: str
    loader: str
    dim: int
    image_size: tuple[int, int]
    context_length: int
    parameters: int | None
    logit_scale: float | None
    image: TowerReport
    text: TowerReport
    captions_cut: int
    """Captions longer than the context."""
    load_seconds: float
    peak_memory_bytes: int
    """Of the device where there is one, else of this process."""
    golden: GoldenReport | None
    open_questions: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether every feature is finite and, where compared, the original's."""
        broken = self.image.not_finite + self.text.not_finite
        return broken == 0 and (self.golden is None or self.golden.verdict != _DIFFERENT)


_SAME, _DIFFERENT, _UNKNOWN = "the original's model", "not the original's model", "no published feature to compare with"


def check_teacher(
    spec: TeacherSpec, device: torch.device, images: Path | None = None, golden: Path | None = None
) -> CheckReport:
    """Find or download the weights, load them strictly, run pictures and captions.

    Args:
        spec: the teacher.
        device: where to run it.
        images: folder of pictures; None for the drawn ones.
        golden: folder of the original's samples.

    Raises:
        TeacherError: whatever stands in the way, in one line.
    """
    loader = find_loader(spec)
    card = loader.describe(spec)
    samples = read_golden(golden, spec.slug) if golden is not None else None
    started = time.perf_counter()
    teacher = loader.load(spec, card, device)
    load_seconds = time.perf_counter() - started
    pixels = _pixels(teacher, pictures_in(images) if images is not None else drawn_pictures())
    tokens, lengths = teacher.tokenize(list(CAPTIONS))
    published = find_published(spec.slug, missing_ok=True)
    return CheckReport(
        slug=spec.slug,
        source=card.source,
        digest=card.digest,
        loader=card.loader,
        dim=card.dim,
        image_size=card.preprocessing.image_size,
        context_length=card.context_length,
        parameters=teacher.parameters if isinstance(teacher, LoadedTeacher) else None,
        logit_scale=card.logit_scale,
        image=_run(teacher, "encode_images", pixels),
        text=_run(teacher, "encode_texts", tokens.to(device)),
        captions_cut=sum(length > card.context_length for length in lengths),
        load_seconds=load_seconds,
        peak_memory_bytes=_peak_memory(device),
        golden=None if samples is None else _golden(teacher, samples),
        open_questions=published.open_questions if published else (),
    )


def _pixels(teacher: Teacher, pictures: list[Image.Image]) -> torch.Tensor:
    transform = pixel_transform(geometry_of(teacher.card.preprocessing))
    return torch.from_numpy(np.stack([transform(picture) for picture in pictures])).to(teacher.device)


def _run(teacher: Teacher, method: str, inputs: torch.Tensor) -> TowerReport:
    getattr(teacher, method)(inputs[:1])  # the first call pays for what later ones reuse
    started = time.perf_counter()
    features: torch.Tensor = getattr(teacher, method)(inputs).cpu()
    seconds = time.perf_counter() - started
    finite = torch.isfinite(features).all(dim=1)
    norms = features[finite].norm(dim=1) if finite.any() else torch.zeros(1)
    return TowerReport(
        inputs=len(inputs),
        norm_smallest=float(norms.min()),
        norm_largest=float(norms.max()),
        not_finite=int((~finite).sum()),
        beyond_float16=int((features.abs() > _FLOAT16_MAX).any(dim=1).sum()),
        not_finite_in_half=_half_precision(teacher, method, inputs),
        per_second=len(inputs) / seconds,
    )


def _half_precision(teacher: Teacher, method: str, inputs: torch.Tensor) -> dict[str, int]:
    if not isinstance(teacher, LoadedTeacher):
        return {}
    halves: tuple[Precision, ...] = ("fp16", "bf16")
    counts: dict[str, int] = {}
    for precision in halves:
        half = teacher.in_precision(precision)
        getattr(half, method)(inputs)
        counts[precision] = half.half_precision_failures
    return counts


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _golden(teacher: Teacher, samples: list[GoldenSample]) -> GoldenReport:
    cosines = golden_cosines(teacher, samples)
    if not cosines:
        return GoldenReport(samples=0, smallest_image_cosine=None, smallest_text_cosine=None, verdict=_UNKNOWN)
    image, text = min(c.image for c in cosines), min(c.text for c in cosines)
    verdict = _SAME if min(image, text) >= SAME else _DIFFERENT
    return GoldenReport(samples=len(cosines), smallest_image_cosine=image, smallest_text_cosine=text, verdict=verdict)
