"""Geometry from a decoded picture to a teacher's pixels, before normalization.

Teachers that agree on geometry share one resize; mean and std are applied on the device (`normalize`). Each resize mode
is the reference implementation's own arithmetic, so the two together are bit-equal to it:

    shortest, longest, squash   open_clip's evaluation transform
    hf_shortest, hf_squash      transformers' image processor (PIL backend): color first, crop margins halved downwards
    pad_square                  MedCLIP's: one channel, padded to a square of at least the target, then resized
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from mmkd.base.errors import TeacherError
from mmkd.base.images.source import MAX_PIXELS, ImageError
from mmkd.store import Preprocessing

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Geometry:
    """The part of a teacher's preprocessing that moves pixels; equal geometries share the work."""

    image_size: tuple[int, int]
    interpolation: str
    resize_mode: str
    fill: int
    color: str


def geometry_of(preprocessing: Preprocessing) -> Geometry:
    return Geometry(**{field.name: getattr(preprocessing, field.name) for field in fields(Geometry)})


@cache
def pixel_transform(geometry: Geometry) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """Return the function from a picture to uint8 (C, H, W) of this geometry, C 3 for RGB and 1 for L; it raises
    ImageError for one so thin that resizing it would fill the memory. Raises TeacherError for an unknown mode."""
    movers = {"hf_shortest": _shortest_like_transformers, "hf_squash": _squash, "pad_square": _pad_to_square}
    known = ("shortest", "longest", "squash", *movers)
    if geometry.resize_mode not in known or geometry.interpolation not in _FILTERS:
        raise TeacherError(
            f"preprocessing {geometry.resize_mode!r} with {geometry.interpolation!r} does not exist: "
            f"resize_mode is one of {', '.join(known)}, interpolation one of {', '.join(_FILTERS)}"
        )
    mover = movers.get(geometry.resize_mode)
    move = partial(mover, geometry) if mover else _open_clip_steps(geometry)

    def transform(picture: Image.Image) -> NDArray[np.uint8]:
        _check_intermediate(geometry, *picture.size)
        pixels = np.array(move(picture), dtype=np.uint8)
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    return transform


def _check_intermediate(geometry: Geometry, width: int, height: int) -> None:
    """Raise ImageError for more than 4 bytes times `MAX_PIXELS` between the steps (Pillow keeps RGB in four bytes)."""
    made = 0
    if geometry.resize_mode in ("shortest", "hf_shortest"):
        made = min(geometry.image_size) ** 2 * max(width, height) // min(width, height)
    elif geometry.resize_mode == "pad_square":
        made = max(geometry.image_size[0], width, height) ** 2
    if made * (1 if geometry.color == "L" else 4) > 4 * MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are too thin: resized, they would be {made:,}")


def _open_clip_steps(geometry: Geometry) -> Callable[[Image.Image], Image.Image]:
    height, width = geometry.image_size
    config = PreprocessCfg(
        size=height if height == width else (height, width),
        interpolation=geometry.interpolation,
        resize_mode=geometry.resize_mode,
        fill_color=geometry.fill,
    )
    *steps, to_tensor, normalize_step = image_transform_v2(config, is_train=False).transforms
    # The last two steps are what `normalize` does on the device; anything else would be lost in silence.
    assert isinstance(to_tensor, ToTensor)
    assert isinstance(normalize_step, Normalize)
    move: Callable[[Image.Image], Image.Image] = Compose(steps)
    return move


def _shortest_like_transformers(geometry: Geometry, picture: Image.Image) -> Image.Image:
    """Shorter side to the target, then the middle; alpha is dropped, as transformers 4 did. Source: transformers,
    image_transforms.get_resize_output_image_size and center_crop. torchvision rounds the margin half to even instead,
    which shifts every fourth margin by a pixel."""
    colored = picture.convert(geometry.color)
    target_height, target_width = geometry.image_size
    width, height = colored.size
    shorter = min(geometry.image_size)
    long_side = int(shorter * max(width, height) / min(width, height))
    size = (shorter, long_side) if width <= height else (long_side, shorter)
    resized = colored.resize(size, _FILTERS[geometry.interpolation])
    left, top = (size[0] - target_width) // 2, (size[1] - target_height) // 2
    return resized.crop((left, top, left + target_width, top + target_height))


def _squash(geometry: Geometry, picture: Image.Image) -> Image.Image:
    height, width = geometry.image_size
    return picture.convert(geometry.color).resize((width, height), _FILTERS[geometry.interpolation])


def _pad_to_square(geometry: Geometry, picture: Image.Image) -> Image.Image:
    """Center the picture on a square that is at least the target, then resize. Source: github.com/RyanWangZf/MedCLIP,
    medclip/dataset.py, MedCLIPFeatureExtractor.pad_img."""
    height, width = geometry.image_size
    side = max(height, *picture.size)
    square = Image.new(geometry.color, (side, side), geometry.fill)
    square.paste(picture.convert(geometry.color), ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((width, height), _FILTERS[geometry.interpolation])


def normalize(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale uint8 (B, C, H, W) to float32 of the same shape: divide by 255, subtract mean, divide by std, in the order
    of torchvision's ToTensor and Normalize."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, device=pixels.device).view(-1, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)
