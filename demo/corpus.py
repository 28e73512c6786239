"""Cut the demo's corpus out of pictures inside installed packages: crops on disk and three caption tables.

    DIR/private/captions.csv   crops with clean captions: what the specialists are tuned on   split = private
    DIR/train/captions.csv     other crops of the same regions, captioned as found pairs are: what the store holds and
                               the student learns from                                        split = train
    DIR/eval/captions.csv      one row a test crop, then the class prompts                    split = test, prompt
    DIR/*/images/*.png         the crops, 96 x 96, gray or RGB

Columns: key, image (relative to its table; empty for a prompt), caption, modality, domain, class, split, row_kind
(sample, or prompt: a text that lacks no image), fits: whether the caption is right, vague (it names nothing that is
seen) or wrong (that of a crop of another class). No step of the demo reads `fits`; it is there for those who look for
wrong captions. The same seed gives the same bytes.
"""

import csv
import importlib.util
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.base.errors import UserError
from mmkd.base.files import disk_errors
from mmkd.demo.sources import SOURCES, Box, File, Source, missing_package
from mmkd.store.evaluation_rows import PROMPT, SAMPLE

CROP_SIZE = 96
"""Side of every crop in pixels."""
COLUMNS = ("key", "image", "caption", "modality", "domain", "class", "split", "row_kind", "fits")
VAGUE_SHARE, WRONG_SHARE = 0.3, 0.4
"""Shares of the training captions."""
VAGUE = ("medical image", "figure from a case report", "image of the patient", "representative example", "see text",
         "typical finding", "scan", "a picture for teaching", "panel A", "figure 2", "the lesion is shown",
         "clinical image")  # fmt: skip
MIN_CONTRAST = 5.0
"""A crop whose gray values (0..255) have a smaller standard deviation shows background and is skipped."""
_ATTEMPTS_PER_CROP = 50

Image = npt.NDArray[np.uint8]
Row = dict[str, str]


@dataclass(frozen=True)
class Crop:
    """One square of one frame of a source."""

    source: Source
    split: str
    frame: int
    box: Box


@dataclass(frozen=True)
class CorpusSummary:
    """Output of `build_corpus`."""

    private_csv: Path
    train: int
    test: int
    prompts: int
    classes: tuple[str, ...]


def build_corpus(
    out: Path,
    seed: int = 0,
    train_per_class: int = 64,
    test_per_class: int = 20,
    sources: Sequence[Source] = SOURCES,
    vague: float = VAGUE_SHARE,
    wrong: float = WRONG_SHARE,
) -> CorpusSummary:
    """Write `out`/private, `out`/train and `out`/eval; files of the same names are replaced. `train_per_class`: crops
    of a class in each of the first two; `vague`, `wrong`: shares of the training captions, each drawn by itself.
    Raises UserError if a package that holds or reads a picture is not installed, or lacks the picture."""
    check_packages(sources)
    from PIL import Image as Pillow

    folders = {"private": "private", "train": "train", "test": "eval"}
    tables = {split: out / folder / "captions.csv" for split, folder in folders.items()}
    rows: dict[str, list[Row]] = {split: [] for split in tables}
    for table in tables.values():
        with disk_errors(out):
            (table.parent / "images").mkdir(parents=True, exist_ok=True)
    for source in sources:
        cut = choose_crops(source, "train", 2 * train_per_class, seed)
        crops = {"private": cut[:train_per_class], "train": cut[train_per_class:]}
        crops["test"] = choose_crops(source, "test", test_per_class, seed)
        for split, table in tables.items():
            for number, crop in enumerate(crops[split]):
                row = image_row(crop, split, number)
                Pillow.fromarray(pixels(crop)).save(table.parent / row["image"], format="PNG")
                rows[split].append(row)
    # For zero-shot classification: rows without an image.
    prompts = [
        _row(source, f"prompt-{source.slug}-{i}", "", text, "prompt")
        for source in sources
        for i, text in enumerate((*source.prompts, source.name))
    ]
    rows |= {"train": as_found(rows["train"], seed, vague, wrong), "test": rows["test"] + prompts}
    for split, table in tables.items():
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[split])
    return CorpusSummary(
        private_csv=tables["private"],
        train=len(rows["train"]),
        test=len(rows["test"]) - len(prompts),
        prompts=len(prompts),
        classes=tuple(source.slug for source in sources),
    )


def as_found(rows: Sequence[Row], seed: int, vague: float, wrong: float) -> list[Row]:
    """Return the rows with realistic captions: shares of them vague or of another class."""
    rng = np.random.default_rng([seed, zlib.crc32(b"captions")])
    found = []
    for row in rows:
        chance, others = rng.random(), [other for other in rows if other["class"] != row["class"]]
        changes: Row = {}
        if chance < wrong and others:
            changes = {"caption": others[rng.integers(len(others))]["caption"], "fits": "wrong"}
        elif wrong <= chance < wrong + vague:
            changes = {"caption": VAGUE[rng.integers(len(VAGUE))], "fits": "vague"}
        found.append(row | changes)
    return found


def choose_crops(source: Source, split: str, count: int, seed: int = 0) -> list[Crop]:
    """Choose `count` different crops of one split, spread evenly over its frames and at random over its boxes. Raises
    UserError if the picture does not have that many crops that show more than background."""
    boxes, ranges = (source.train, source.train_frames) if split == "train" else (source.test, source.test_frames)
    rng = np.random.default_rng([seed, zlib.crc32(f"{source.slug}/{split}".encode())])
    numbers = rng.permutation([number for frames in ranges for number in frames])
    areas = np.array([(right - left) * (bottom - top) for left, top, right, bottom in boxes], dtype=np.float64)
    chosen: dict[Crop, None] = {}  # a set that keeps its order
    for attempt in range(count * _ATTEMPTS_PER_CROP):
        if len(chosen) == count:
            break
        left, top, right, bottom = boxes[rng.choice(len(boxes), p=areas / areas.sum())]
        side = min(int(rng.integers(source.window[0], source.window[1] + 1)), right - left, bottom - top)
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
        crop = Crop(source, split, int(numbers[attempt % len(numbers)]), (x, y, x + side, y + side))
        image = pixels(crop)
        if (image if image.ndim == 2 else image.mean(axis=2)).std() >= MIN_CONTRAST:
            chosen[crop] = None
    if len(chosen) < count:
        raise UserError(f"{source.slug}: found {len(chosen)} {split} crops of {count}; ask for fewer crops a class")
    return list(chosen)


def pixels(crop: Crop) -> Image:
    """Return the crop at `CROP_SIZE`: uint8 (96, 96) gray or (96, 96, 3) RGB."""
    from PIL import Image as Pillow

    left, top, right, bottom = crop.box
    patch = read_frames(crop.source.file, crop.source.level, crop.source.axis)[crop.frame, top:bottom, left:right]
    picture = Pillow.fromarray(np.ascontiguousarray(patch))
    return np.asarray(picture.resize((CROP_SIZE, CROP_SIZE), Pillow.Resampling.BICUBIC))


def image_row(crop: Crop, split: str, number: int) -> Row:
    """Return the table row of the `number`-th crop of its class and split; every other caption says where it lies."""
    source = crop.source
    words = source.captions if crop.split == "train" else source.prompts
    caption = words[number % len(words)]
    if number // len(words) % 2:
        caption += f", {_place(crop)}" if crop.split == "train" else f" ({_place(crop)})"
    key = f"{source.slug}-{split}-{number:03d}"
    return _row(source, key, f"images/{key}.png", caption, split)


def check_packages(sources: Sequence[Source]) -> None:
    """Check that all pictures and readers are installed before writing. Raises UserError for the first that is
    missing."""
    for module, package in {"PIL": "pillow", "pydicom": "pydicom", "nibabel": "nibabel"}.items():
        if importlib.util.find_spec(module) is None:
            raise missing_package(package)
    from PIL import features

    if not features.check("jpg_2000"):  # two of the CTs use it; Pillow's own wheels can read it
        raise UserError("this Pillow cannot read JPEG 2000; run: pip install --force-reinstall pillow")
    for source in sources:
        source.file.locate()


@lru_cache(maxsize=2)
def read_frames(file: File, level: tuple[int, int] | None, axis: int | None) -> Image:
    """Return all frames of a file, uint8 (F, H, W) gray or (F, H, W, 3) RGB; F is 1 for a single picture."""
    path = file.locate()
    if path.suffix == ".dcm":
        return _read_dicom(path, level)
    if path.suffix == ".gz":
        return _read_volume(path, level, axis or 0)
    from PIL import Image as Pillow

    with Pillow.open(path) as picture:
        return np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))[None]


def _read_dicom(path: Path, level: tuple[int, int] | None) -> Image:
    """Stored values to gray (modality rescale, then `level`, bones white) or to RGB."""
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    data = dcmread(path)
    values: npt.NDArray[Any] = data.pixel_array
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, data)
        return (values >> (8 * (values.itemsize - 1))).astype(np.uint8)[None]  # palettes may have 16 bits
    if data.get("SamplesPerPixel", 1) == 3:
        return values if values.ndim == 4 else values[None]
    gray = _to_gray(np.asarray(apply_modality_lut(values, data)), level)
    return (255 - gray if data.PhotometricInterpretation == "MONOCHROME1" else gray)[None]


def _read_volume(path: Path, level: tuple[int, int] | None, axis: int) -> Image:
    """Slices of a NIfTI volume across `axis`, turned so that superior or anterior is up."""
    import nibabel

    values = np.asarray(nibabel.load(path).dataobj)
    gray = values if values.dtype == np.uint8 else _to_gray(values, level)
    return np.rot90(np.moveaxis(gray, axis, 0), axes=(1, 2))


def _to_gray(values: npt.NDArray[Any], level: tuple[int, int] | None) -> Image:
    low, high = np.percentile(values, (1, 99)) if level is None else level
    scaled = np.clip((values.astype(np.float32) - low) / (high - low), 0, 1)
    return np.asarray(np.rint(scaled * 255), dtype=np.uint8)


def _place(crop: Crop) -> str:
    """Return the position of a crop by slice number or thirds of the picture."""
    stack = read_frames(crop.source.file, crop.source.level, crop.source.axis)
    if crop.source.axis is not None:
        return f"slice {crop.frame + 1} of {len(stack)}"
    left, top, right, bottom = crop.box
    height = ("upper", "middle", "lower")[int(3 * (top + bottom) / 2 / stack.shape[1])]
    side = ("left ", "", "right ")[int(3 * (left + right) / 2 / stack.shape[2])]
    return f"{height} {side}part"


def _row(source: Source, key: str, image: str, caption: str, split: str) -> Row:
    kind = PROMPT if split == "prompt" else SAMPLE
    values = (key, image, caption, source.modality, source.domain, source.slug, split, kind, "right")
    return dict(zip(COLUMNS, values, strict=True))
