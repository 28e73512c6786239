"""`mmkd teachers check`: load a teacher for real, run it, and compare it with the features its authors published."""

import json
import pickle
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmkd.base.errors import TeacherError, faults_as
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError
from mmkd.extract.teachers.geometry import geometry_of, pixels_of
from mmkd.extract.teachers.loaded import LoadedTeacher
from mmkd.extract.teachers.loaders import find_loader
from mmkd.extract.teachers.published import known_teacher
from mmkd.extract.teachers.spec import Precision, Teacher, TeacherSpec
from mmkd.store.layout import Tower

_HALVES: tuple[Precision, ...] = ("fp16", "bf16")
_SAME, _DIFFERENT, _UNKNOWN = "the original's model", "not the original's model", "no published feature to compare with"


@dataclass(frozen=True)
class TowerReport:
    """One tower's output on the pictures or captions."""

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


@dataclass(frozen=True)
class GoldenReport:
    samples: int
    smallest_image_cosine: float | None
    smallest_text_cosine: float | None
    verdict: str


@dataclass(frozen=True)
class CheckReport:
    slug: str
    source: str
    digest: str
    loader: str
    dim: int
    image_size: tuple[int, int] | None
    """None without an image tower."""
    context_length: int
    parameters: int | None
    logit_scale: float | None
    towers: dict[Tower, TowerReport]
    captions_cut: int
    load_seconds: float
    peak_memory_bytes: int
    """Peak memory in bytes of the device if there is one, else of this process."""
    golden: GoldenReport | None
    open_questions: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """True if all features are finite and equal the original's where compared."""
        broken = sum(tower.not_finite for tower in self.towers.values())
        return broken == 0 and (self.golden is None or self.golden.verdict != _DIFFERENT)


def check_teacher(
    spec: TeacherSpec, device: torch.device, images: Path | None = None, golden: Path | None = None
) -> CheckReport:
    """Find or download the weights, load them strictly, run pictures and captions. Raises TeacherError. `images`:
    folder of pictures; None for the drawn ones. `golden`: folder of the original's samples."""
    loader = find_loader(spec)
    card = loader.describe(spec)
    samples = read_golden(golden, spec.slug) if golden is not None else None
    started = time.perf_counter()
    teacher = loader.load(spec, card, device)
    load_seconds = time.perf_counter() - started
    towers: dict[Tower, TowerReport] = {}
    lengths: list[int] = []
    look = card.preprocessing
    if look is not None or images is not None:  # who names pictures hears that there is no tower for them
        geometry = geometry_of(card.image_preprocessing)
        pictures = drawn_pictures() if images is None else pictures_in(images)
        arrays = [pixels_of(picture, [geometry])[geometry] for picture in pictures]
        towers["image"] = _run(teacher, "encode_images", torch.from_numpy(np.stack(arrays)).to(device))
    if "text" in card.towers:
        tokens, lengths = teacher.tokenize(list(CAPTIONS))
        towers["text"] = _run(teacher, "encode_texts", tokens.to(device))
    published = known_teacher(spec.slug)
    return CheckReport(
        slug=spec.slug,
        source=card.source,
        digest=card.digest,
        loader=card.loader,
        dim=card.dim,
        image_size=look.image_size if look else None,
        context_length=card.context_length,
        parameters=teacher.parameters if isinstance(teacher, LoadedTeacher) else None,
        logit_scale=card.logit_scale,
        towers=towers,
        captions_cut=sum(length > card.context_length for length in lengths),
        load_seconds=load_seconds,
        # Linux counts a process in kilobytes.
        peak_memory_bytes=torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        golden=None if samples is None else _compare_golden(teacher, samples),
        open_questions=published.open_questions if published else (),
    )


def _run(teacher: Teacher, method: str, inputs: torch.Tensor) -> TowerReport:
    encode: Callable[[torch.Tensor], torch.Tensor] = getattr(teacher, method)
    encode(inputs[:1])  # the first call pays for what later ones reuse
    started = time.perf_counter()
    features = encode(inputs).cpu()
    seconds = time.perf_counter() - started
    finite = torch.isfinite(features).all(dim=1)
    norms = features[finite].norm(dim=1) if finite.any() else torch.zeros(1)
    failures = {}
    if isinstance(teacher, LoadedTeacher):
        for precision in _HALVES:
            half = teacher.in_precision(precision)
            getattr(half, method)(inputs)
            failures[str(precision)] = half.half_precision_failures
    return TowerReport(
        inputs=len(inputs),
        norm_smallest=float(norms.min()),
        norm_largest=float(norms.max()),
        not_finite=int((~finite).sum()),
        beyond_float16=int((features.abs() > torch.finfo(torch.float16).max).any(dim=1).sum()),
        not_finite_in_half=failures,
        per_second=len(inputs) / seconds,
    )


@dataclass(frozen=True)
class GoldenSample:
    """One published sample with the features of one teacher."""

    key: str
    image: Path
    caption: str
    image_feature: torch.Tensor
    """float32 (D,), unit norm."""
    text_feature: torch.Tensor


def read_golden(folder: Path, slug: str) -> list[GoldenSample]:
    """Return the original's demo samples that have features of this teacher, under any of its spellings. Layout, else
    TeacherError (github.com/wangshansong1/MMKD-CLIP, MMKDCLIP_DATA): `meta.jsonl`, a line per sample with `id`,
    `imgpath`, `txt`; beside each picture `clips_output.pt` with unit-norm float32 `<Name>_img`, `<Name>_txt`."""
    published = known_teacher(slug)
    spellings = {slug, *((published.name, *published.also_called) if published else ())}
    meta = folder / "meta.jsonl"
    advice = "; --golden wants the original's folder with meta.jsonl"
    with faults_as(TeacherError, (OSError, ValueError), f"cannot read {meta}", advice):
        lines = [json.loads(line) for line in meta.read_text(encoding="utf-8").splitlines() if line.strip()]
    samples: list[GoldenSample] = []
    for line in lines:
        with faults_as(TeacherError, (KeyError, TypeError), f"{meta} has a line without id, imgpath or txt"):
            key, image, caption = str(line["id"]), folder / str(line["imgpath"]), str(line["txt"])
        if not image.is_file():
            continue  # copies of the release may hold some of its samples only
        path = image.parent / "clips_output.pt"
        with faults_as(TeacherError, (OSError, RuntimeError, EOFError, pickle.UnpicklingError), f"cannot read {path}"):
            features: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        names = {name.removesuffix("_img") for name in features if name.endswith("_img")} & spellings
        vectors = ((features[f"{name}_img"], features[f"{name}_txt"]) for name in sorted(names))
        samples += [GoldenSample(key, image, caption, *pair) for pair in vectors]
    return samples


def _compare_golden(teacher: Teacher, samples: list[GoldenSample]) -> GoldenReport:
    """Run the teacher on published samples. Raises TeacherError if the published features have another width."""
    if not samples:
        return GoldenReport(samples=0, smallest_image_cosine=None, smallest_text_cosine=None, verdict=_UNKNOWN)
    geometry = geometry_of(teacher.card.image_preprocessing)
    images, texts = [], []
    for sample in samples:
        if sample.image_feature.numel() != teacher.card.dim:
            raise TeacherError(
                f"teacher {teacher.card.slug!r} has width {teacher.card.dim}, its published features "
                f"{sample.image_feature.numel()}: another variant was used; see `mmkd teachers list`"
            )
        picture = _decoded(sample.image)
        pixels = torch.tensor(pixels_of(picture, [geometry])[geometry])[None].to(teacher.device)
        tokens, _ = teacher.tokenize([sample.caption])
        image = teacher.encode_images(pixels)[0].cpu()
        text = teacher.encode_texts(tokens.to(teacher.device))[0].cpu()
        images.append(float(torch.cosine_similarity(image, sample.image_feature, dim=0)))
        texts.append(float(torch.cosine_similarity(text, sample.text_feature, dim=0)))
    # Half-precision inference costs about 1e-4.
    verdict = _SAME if min(images + texts) >= 0.999 else _DIFFERENT
    return GoldenReport(len(samples), min(images), min(texts), verdict)


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


def drawn_pictures() -> list[Image.Image]:
    """Rings on a gradient in several sizes, in color and in gray; the same pictures on every machine."""
    pictures, sizes = [], ((512, 512), (640, 480), (97, 301), (224, 224), (1024, 96), (64, 64))
    for number, (width, height) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width].astype(np.float64)
        radius = np.hypot((x - width / 2) / width, (y - height / 2) / height)
        rings = 127.5 * (1 + np.cos(radius * (20 + 7 * number)))
        channels = np.stack([rings, 255 * x / width, 255 * y / height], axis=-1)
        picture = Image.fromarray(channels.round().astype(np.uint8), "RGB")
        pictures.append(picture.convert("L") if number % 3 == 2 else picture)
    return pictures


def pictures_in(folder: Path) -> list[Image.Image]:
    """Return the first 64 pictures of a folder by name. Raises TeacherError without a folder or a picture in it, or for
    one that cannot be decoded."""
    if not folder.is_dir():
        raise TeacherError(f"there is no folder {folder} with pictures")
    named = Image.registered_extensions()
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in named)
    if not paths:
        raise TeacherError(f"{folder} has no picture; expected files that are called .png, .jpg, .tif or the like")
    return [_decoded(path) for path in paths[:64]]


def _decoded(path: Path) -> Image.Image:
    """Return a picture as extraction decodes it. Raises TeacherError if it cannot be decoded."""
    with faults_as(TeacherError, (OSError, ImageError), f"{path} is a broken picture", "; remove it and run again"):
        return decode(path.read_bytes())
