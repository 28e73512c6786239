"""`mmkd teachers check`: load a teacher for real, run it, and compare it with the features its authors published."""

from __future__ import annotations

import json
import pickle
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.geometry import geometry_of, pixel_transform
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.extract.teachers.loaders import find_loader
from mmkd.extract.teachers.protocol import Teacher
from mmkd.extract.teachers.published import find_published
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
    """Result of `check`."""

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
    """Peak memory in bytes of the device if there is one, else of this process."""
    golden: GoldenReport | None
    open_questions: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """True if all features are finite and equal the original's where compared."""
        broken = self.image.not_finite + self.text.not_finite
        return broken == 0 and (self.golden is None or self.golden.verdict != _DIFFERENT)


_SAME, _DIFFERENT, _UNKNOWN = "the original's model", "not the original's model", "no published feature to compare with"


def check_teacher(
    spec: TeacherSpec, device: torch.device, images: Path | None = None, golden: Path | None = None
) -> CheckReport:
    """Find or download the weights, load them strictly, run pictures and captions. Raises TeacherError with the
    obstacle in one line.

    Args:
        spec: the teacher.
        device: where to run it.
        images: folder of pictures; None for the drawn ones.
        golden: folder of the original's samples.
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
    """Compare our features of a published sample with the published ones."""

    key: str
    image: float
    text: float


def read_golden(folder: Path, slug: str) -> list[GoldenSample]:
    """Return the original's own demo samples that have features of this teacher, under any of its spellings. Layout
    (github.com/wangshansong1/MMKD-CLIP, MMKDCLIP_DATA): `meta.jsonl`, one sample per line with `imgpath`, `txt` and
    `available_clips`; beside each picture `clips_output.pt` with unit-norm float32 `<Name>_img`, `<Name>_txt`. Raises
    TeacherError if it is not the original's layout."""
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
    """Run the teacher on published samples. Raises TeacherError if the published features have another width."""
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


CAPTIONS = (
    "chest X-ray showing cardiomegaly",
    "hematoxylin and eosin stained section of colonic adenocarcinoma",
    "axial T2-weighted MRI of the brain",
    "color fundus photograph with hard exudates",
    "dermoscopic image of a melanoma",
    "",
    # Longer than any teacher's context: it must be cut and counted.
    "a long description of an abdominal CT with contrast, " * 60,
)
"""Captions of several modalities, an empty one and one that is too long."""

_SIZES = ((512, 512), (640, 480), (97, 301), (224, 224), (1024, 96), (64, 64))


def drawn_pictures() -> list[Image.Image]:
    """Rings on a gradient in several sizes, in color and in gray; the same pictures on every machine."""
    pictures = []
    for number, (width, height) in enumerate(_SIZES):
        y, x = np.mgrid[0:height, 0:width].astype(np.float64)
        radius = np.hypot((x - width / 2) / width, (y - height / 2) / height)
        rings = 127.5 * (1 + np.cos(radius * (20 + 7 * number)))
        channels = np.stack([rings, 255 * x / width, 255 * y / height], axis=-1)
        picture = Image.fromarray(channels.round().astype(np.uint8), "RGB")
        pictures.append(picture.convert("L") if number % 3 == 2 else picture)
    return pictures


def pictures_in(folder: Path, limit: int = 64) -> list[Image.Image]:
    """Return the first `limit` pictures of a folder by name. Raises TeacherError if there is no folder, no picture in
    it, or one that cannot be decoded."""
    if not folder.is_dir():
        raise TeacherError(f"there is no folder {folder} with pictures")
    pictures = list(_readable(sorted(folder.iterdir()), limit))
    if not pictures:
        raise TeacherError(f"{folder} has no picture that can be read; expected PNG, JPEG, TIFF or the like")
    return pictures


def _readable(paths: list[Path], limit: int) -> Iterator[Image.Image]:
    found = 0
    for path in paths:
        if found == limit:
            return
        if not path.is_file():
            continue
        try:
            picture = Image.open(path)
            picture.load()
        except UnidentifiedImageError as error:
            if path.suffix.lower() not in Image.registered_extensions():
                continue
            raise TeacherError(f"{path} is a broken picture ({error}); remove it and run again") from error
        except OSError as error:
            raise TeacherError(f"{path} is a broken picture ({error}); remove it and run again") from error
        found += 1
        yield picture
