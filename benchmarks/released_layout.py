"""The original release written anew from its description, not its code: its layout, and its loader."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

WIDTHS = {"BMCA": 768, "BiomedCLIP": 512, "UniMedCLIP": 512, "PMCCLIP": 768, "QuiltNet": 512}
WIDTHS |= {"GenMedClip": 512, "PLIP": 512, "PUBMEDCLIP": 512, "MedCLIP": 512}
PROJECTED = 512
PRESENT = 19.2 / 2.9 / 9  # pairs of a sample's teachers that are there
FOLDER = "data_0"


def write_release(root: Path, rows: int) -> None:
    """The original's layout, as its demo has it."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (25, 25, 3), dtype=np.uint8)
    picture = root / "picture.jpg"
    root.mkdir(parents=True)
    Image.fromarray(noise).resize((400, 400), Image.Resampling.BICUBIC).save(picture, quality=90)
    jpeg = picture.read_bytes()
    picture.unlink()
    lines = []
    for row in range(rows):
        name = f"{row:032x}"
        folder = root / "features" / FOLDER / name
        folder.mkdir(parents=True)
        names = [slug for slug in WIDTHS if rng.random() < PRESENT] or ["BiomedCLIP"]
        for file, width in (("clips_output", None), ("clips_project_output", PROJECTED)):
            torch.save(features_of(names, width, rng), folder / f"{file}.pt")
        place = f"features/{FOLDER}/{name}/{name}"
        (root / f"{place}.jpg").write_bytes(jpeg)
        (root / f"{place}.json").write_text(json.dumps({"image_primary_label": "Clinical", "row": row}))
        line = {"folderid": FOLDER, "id": name, "imgpath": f"{place}.jpg", "metapath": f"{place}.json"}
        lines.append(json.dumps(line | {"txt": f"finding number {row} of the lung", "available_clips": names}))
    (root / "meta.jsonl").write_text("\n".join(lines) + "\n")


def features_of(names: Iterable[str], width: int | None, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """One sample's file."""
    return {
        f"{name}_{tower}": torch.from_numpy(rng.standard_normal(width or WIDTHS[name], dtype=np.float32))
        for name in names
        for tower in ("img", "txt")
    }


def cropped(picture: Image.Image) -> torch.Tensor:
    """A training image; the same for both sides."""
    return CROP(v2.functional.pil_to_tensor(picture.convert("RGB")))


CROP: Callable[[torch.Tensor], torch.Tensor] = v2.RandomResizedCrop(224, scale=(0.9, 1.0), antialias=True)


class ReleasedRows(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """The released loader: lines of `meta.jsonl` as dicts; all teachers of a sample read, one of them kept."""

    def __init__(self, root: Path, images: bool) -> None:
        self.root, self.images = root, images
        with (root / "meta.jsonl").open() as lines:
            self.lines = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        line = self.lines[row]
        name = random.choice(line["available_clips"])
        file = self.root / "features" / line["folderid"] / line["id"] / "clips_project_output.pt"
        found = torch.load(file, weights_only=True)
        if not self.images:
            return torch.empty(0), found[f"{name}_img"], found[f"{name}_txt"]
        with Image.open(self.root / line["imgpath"]) as picture:
            return cropped(picture), found[f"{name}_img"], found[f"{name}_txt"]
