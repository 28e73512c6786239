"""The picture of a sample row, whole or as a thumbnail. Needs Pillow."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.base.images.decoding import decode
from mmkd.base.images.recipe import read_recipe
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.store.record import StoreRecord

NO_IMAGE = "the row has no image"


def picture(record: StoreRecord, sample: Mapping[str, Any]) -> Image.Image:
    """Read the picture of a whole sample row of a store with this record; a view is made again. Raises ImageError,
    whose message has no path, if the row has none, its name leads out of the corpus, or the file is missing or
    damaged; UserError as `read_recipe`."""
    uri, corpus = sample["uri"], record.span_of(sample["row"]).corpus
    if uri is None:
        raise ImageError(NO_IMAGE)
    root = Path(corpus.root)
    # A store from elsewhere is not to make us show any file of this machine.
    if "://" not in corpus.root and not (root / uri).resolve().is_relative_to(root.resolve()):
        raise ImageError("its name leads out of the corpus")
    source = image_source(corpus.root, uri, sample["offset"], sample["length"])
    if corpus.recipe is not None:
        recipe = read_recipe(corpus.recipe, "the store's record")
        source = recipe.source(source, sample["key"], sample["view_number"])
    return source.picture(decode(source.read()))


def thumbnail(image: Image.Image, side: int) -> bytes:
    """Return JPEG bytes of the whole picture, at most `side` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=70, optimize=True)
    return out.getvalue()
