"""The picture of a sample row, whole or as a thumbnail. Needs Pillow."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source

NO_IMAGE = "the row has no image"


def picture(corpus_root: str, sample: Mapping[str, Any]) -> Image.Image:
    """Read the picture of `sample` (`uri`, `offset`, `length`) below `corpus_root`. Raises ImageError, whose message
    has no path, if the row has none, its name leads out of the corpus, or the file is missing or damaged."""
    uri = sample["uri"]
    if uri is None:
        raise ImageError(NO_IMAGE)
    root = Path(corpus_root)
    # A store from elsewhere is not to make us show any file of this machine.
    if "://" not in corpus_root and not (root / uri).resolve().is_relative_to(root.resolve()):
        raise ImageError("its name leads out of the corpus")
    return decode(image_source(corpus_root, uri, sample["offset"], sample["length"]).read())


def thumbnail(image: Image.Image, side: int) -> bytes:
    """Return JPEG bytes of the whole picture, at most `side` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=70, optimize=True)
    return out.getvalue()
