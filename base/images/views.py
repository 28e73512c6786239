"""Views: a square crop of an image, mirrored only if asked, its colors jittered. Integers and tables of 256 values from
the decoded pixels on, so that extraction and training, on any machine, see the same view bit for bit."""

from dataclasses import dataclass
from hashlib import blake2b
from math import floor, sqrt
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from mmkd.base.images.recipe import Recipe


class Views(Recipe):
    """Recipe of training views. The defaults change what a picture is of, not what it looks like: side, stain and
    window of a medical image carry meaning, so that mirroring and jitter are for those who know that theirs do not."""

    option: ClassVar = "--views"

    kind: Literal["views"] = "views"
    count: int = Field(gt=0, le=1000)
    seed: int = Field(default=0, ge=0)
    area: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the largest square in the image that a crop covers."""
    flip: bool = False
    """Mirror one view in two."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Factors of brightness, contrast and saturation are drawn from 1 - x to 1 + x; 0 leaves them alone."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)

    @field_validator("area")
    @classmethod
    def _area_is_a_range(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"area is {list(area)}, expected two shares above 0 and up to 1, the smaller one first")
        return area

    def picture(self, image: Image.Image, key: str, number: int) -> Image.Image:
        return draw(self, key, number).apply(image)


@dataclass(frozen=True)
class View:
    """What was drawn for one view, whatever the size of the image."""

    area: float
    """Share of the largest square in the image."""
    place: tuple[float, float]
    """From the left and the top, 0 to 1, of the free way."""
    flip: bool
    brightness: float
    contrast: float
    saturation: float

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the crop in pixels."""
        side = max(1, round(min(width, height) * sqrt(self.area)))
        left, top = (
            min(floor(share * (length - side + 1)), length - side)
            for share, length in zip(self.place, (width, height), strict=True)
        )
        return left, top, left + side, top + side

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the view of a decoded image in mode `L` or `RGB`, in the same mode."""
        view = image.crop(self.box(*image.size))
        if self.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if (self.brightness, self.contrast) != (1.0, 1.0):
            # Contrast about the mean gray, as torchvision's ColorJitter.
            counts = view.convert("L").histogram()
            mean = sum(value * count for value, count in enumerate(counts)) / sum(counts)
            levels = ((mean + (value - mean) * self.contrast) * self.brightness for value in range(256))
            view = view.point([min(255, max(0, floor(level + 0.5))) for level in levels] * len(view.mode))
        if self.saturation != 1.0 and view.mode == "RGB":
            share = round(256 * self.saturation)
            rest = np.asarray(view.convert("L"), dtype=np.int32) * (256 - share) + 128
            # A color at a time: NumPy is slow along an axis of three.
            colors = ((np.asarray(color, dtype=np.int32) * share + rest) >> 8 for color in view.split())
            view = Image.merge("RGB", [Image.fromarray(color.clip(0, 255).astype(np.uint8)) for color in colors])
        return view


def draw(recipe: Views, key: str, number: int) -> View:
    """Draw view `number` of the image whose row has this key: seven numbers from 0 to 1 out of the BLAKE2b hash of
    `SEED NUMBER KEY`, 53 bits of eight bytes each. A hash needs no state, and no library changes it."""
    text = f"{recipe.seed} {number} {key}".encode("utf-8", "surrogatepass")
    bits = np.frombuffer(blake2b(text, digest_size=56).digest(), dtype="<u8") >> np.uint64(11)
    area, left, top, mirror, *colors = (bits * 2.0**-53).tolist()
    low, high = recipe.area
    ranges = recipe.brightness, recipe.contrast, recipe.saturation
    factors = (1 + (2 * color - 1) * most for color, most in zip(colors, ranges, strict=True))
    return View(low + area * (high - low), (left, top), recipe.flip and mirror < 0.5, *factors)
