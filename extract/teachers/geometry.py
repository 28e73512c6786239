"""Geometry from a decoded picture to a teacher's pixels, before normalization.

Geometries that agree on color and size share one resize; mean and std are applied on the device (`normalize`). Each
resize mode places its pixels as the reference implementation does, and the two together are bit-equal to it:

    shortest, longest, squash   open_clip's evaluation transform (`open_clip.transform.image_transform_v2`)
    hf_shortest, hf_squash      transformers' image processor (PIL backend): color first, crop margins halved downwards
    pad_square                  MedCLIP's: one channel, padded to a square of at least the target, then resized
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmkd.base.errors import TeacherError
from mmkd.base.images.resampling import FILTERS, Canvas, resize
from mmkd.base.images.source import MAX_PIXELS, ImageError
from mmkd.store import Preprocessing

_CROPPING = ("shortest", "hf_shortest")
_MODES = ("shortest", "longest", "squash", "hf_shortest", "hf_squash", "pad_square")


@dataclass(frozen=True)
class Geometry:
    """The part of a teacher's preprocessing that moves pixels; equal geometries share the work. Raises TeacherError for
    an unknown mode."""

    image_size: tuple[int, int]
    interpolation: str
    resize_mode: str
    fill: int
    color: str
    resize: int = 0

    def __post_init__(self) -> None:
        if self.resize and (self.resize_mode not in _CROPPING or len(set(self.image_size)) > 1):
            raise TeacherError(
                f"preprocessing has resize {self.resize}, image_size {self.image_size}, resize_mode "
                f"{self.resize_mode!r}: resize goes with a square and {' or '.join(_CROPPING)}; leave it out"
            )
        if self.resize_mode not in _MODES or self.interpolation not in FILTERS:
            raise TeacherError(
                f"preprocessing {self.resize_mode!r} with {self.interpolation!r} does not exist: "
                f"resize_mode is one of {', '.join(_MODES)}, interpolation one of {', '.join(FILTERS)}"
            )


@dataclass(frozen=True)
class _Placement:
    """Where a geometry's pixels come from."""

    mode: str
    """`L` or `RGB` of the picture when it is resized."""
    side: int
    """Of the square that the picture is laid on before, 0 for none."""
    fill: int
    size: tuple[int, int]
    """Width and height, resized."""
    interpolation: str
    left: int
    """Of the geometry's pixels in the resized picture; negative where they begin outside of it."""
    top: int


def geometry_of(preprocessing: Preprocessing) -> Geometry:
    """Return the geometry of a card. Raises TeacherError for an unknown mode."""
    return Geometry(**{field.name: getattr(preprocessing, field.name) for field in fields(Geometry)})


def pixels_of(picture: Image.Image, geometries: Sequence[Geometry]) -> dict[Geometry, NDArray[np.uint8]]:
    """Return uint8 (C, H, W) of a picture in mode `L` or `RGB` for each geometry, C 3 for RGB and 1 for L; equal arrays
    may be one. Raises ImageError for a picture so thin that a side would vanish or the reference fill the memory."""
    groups: dict[tuple[tuple[str, int, int], tuple[int, int], str], list[tuple[Geometry, _Placement]]] = {}
    for geometry in geometries:
        p = _place(geometry, picture.mode, *picture.size)
        canvas = p.mode, p.side, p.side and p.fill
        groups.setdefault((canvas, p.size, p.interpolation), []).append((geometry, p))
    sources = {canvas: Canvas(picture, *canvas) for canvas, _, _ in groups}
    found: dict[Geometry, NDArray[np.uint8]] = {}
    for (canvas, size, interpolation), members in groups.items():
        boxes = [
            (p.left, p.top, min(p.left + g.image_size[1], size[0]), min(p.top + g.image_size[0], size[1]))
            for g, p in members
        ]
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        part = max(min(lefts), 0), max(min(tops), 0), max(rights), max(bottoms)
        values = resize(sources[canvas], size, interpolation, part)
        for geometry, p in members:
            found[geometry] = _window(geometry, p, values, part[0], part[1])
    return found


def _window(
    geometry: Geometry, placement: _Placement, values: NDArray[np.uint8], left: int, top: int
) -> NDArray[np.uint8]:
    """Return the geometry's pixels out of `values`, which begin at `left` and `top` of the resized picture."""
    height, width = geometry.image_size
    x, y = placement.left - left, placement.top - top
    inside = values[:, max(y, 0) : y + height, max(x, 0) : x + width]
    channels = 1 if geometry.color == "L" and not _is_open_clip(geometry) else 3
    if inside.shape == (channels, height, width):
        return np.ascontiguousarray(inside)
    made = np.full((channels, height, width), placement.fill, dtype=np.uint8)
    begin_y, begin_x = max(-y, 0), max(-x, 0)
    made[:, begin_y : begin_y + inside.shape[1], begin_x : begin_x + inside.shape[2]] = inside
    return made


def _is_open_clip(geometry: Geometry) -> bool:
    return geometry.resize_mode in ("shortest", "longest", "squash")


def _place(geometry: Geometry, mode: str, width: int, height: int) -> _Placement:
    """Return where the pixels for a picture of this mode and size come from. Gray stays one channel until the end:
    three equal channels give three times the same."""
    _check_intermediate(geometry, width, height)
    target_height, target_width = geometry.image_size
    interpolation, side, fill = geometry.interpolation, 0, 0
    size = target_width, target_height
    match geometry.resize_mode:
        case "shortest" if target_width != target_height:
            # open_clip gives this resize no interpolation: it is always bicubic.
            scale, interpolation = min(height / target_height, width / target_width), "bicubic"
            size = round(width / scale), round(height / scale)
        case "longest":
            scale, fill = max(height / target_height, width / target_width), geometry.fill
            size = round(width / scale), round(height / scale)
        case "shortest" | "hf_shortest":
            # torchvision's Resize, and transformers' get_resize_output_image_size
            shorter = geometry.resize or min(geometry.image_size)
            long_side = int(shorter * max(width, height) / min(width, height))
            size = (shorter, long_side) if width <= height else (long_side, shorter)
        case "pad_square":
            side, fill = max(target_height, width, height), geometry.fill
    if min(size) < 1:
        raise ImageError(f"{width} x {height} pixels are too thin: resized, a side would have none")
    if geometry.resize_mode == "hf_shortest":
        # transformers, image_transforms.center_crop
        left, top = (size[0] - target_width) // 2, (size[1] - target_height) // 2
    else:
        # torchvision rounds half to even, and pads first, the smaller half before the picture.
        left, top = (
            round((whole - kept) / 2) if whole >= kept else -((kept - whole) // 2)
            for whole, kept in zip(size, (target_width, target_height), strict=True)
        )
    color = mode if _is_open_clip(geometry) or mode == "L" else geometry.color
    return _Placement(color, side, fill, size, interpolation, left, top)


def _check_intermediate(geometry: Geometry, width: int, height: int) -> None:
    """Raise ImageError for more than 4 bytes times `MAX_PIXELS` between the steps (Pillow keeps RGB in four bytes)."""
    made = 0
    if geometry.resize_mode in _CROPPING:
        made = (geometry.resize or min(geometry.image_size)) ** 2 * max(width, height) // min(width, height)
    elif geometry.resize_mode == "pad_square":
        made = max(geometry.image_size[0], width, height) ** 2
    if made * (1 if geometry.color == "L" else 4) > 4 * MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are too thin: resized, they would be {made:,}")


def normalize(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale uint8 (B, C, H, W) to float32 of the same shape: divide by 255, subtract mean, divide by std, in the order
    of torchvision's ToTensor and Normalize."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, device=pixels.device).view(-1, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)
