"""Pictures and captions to try a teacher on: drawn, so that nothing needs to be shipped or downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmkd.base.errors import TeacherError

CAPTIONS = (
    "chest X-ray showing cardiomegaly",
    "hematoxylin and eosin stained section of colonic adenocarcinoma",
    "axial T2-weighted MRI of the brain",
    "color fundus photograph with hard exudates",
    "dermoscopic image of a melanoma",
    "",
    # Longer than any teacher's context: it must be cut, counted and told.
    "a long description of an abdominal CT with contrast, " * 60,
)
"""Captions of several modalities, an empty one and one that is too long."""

_SIZES = ((512, 512), (640, 480), (97, 301), (224, 224), (1024, 96), (64, 64))


def drawn_pictures() -> list[Image.Image]:
    """Rings on a gradient in several sizes, in color and in grey; the same pictures on every machine."""
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
    """The first `limit` pictures of a folder by name.

    Raises:
        TeacherError: no folder, no picture in it, or one that cannot be decoded.
    """
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
