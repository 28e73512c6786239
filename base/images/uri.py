"""Encoded image bytes of a sample row: a file, a slice, a Parquet cell, a frame, a tile, an array's row.

A `uri` may end in a fragment that says which image inside the file is meant:

    train-0.parquet#column=image.bytes&row=12      a cell
    train-0.parquet#column=images&row=12&item=2    an item of a cell that holds a list
    echo.dcm#frame=59                              a frame, counted from 0
    slide.svs#x=512&y=1024&side=448&out=224        a square of the slide: level-0 pixels, brought to `out` pixels
    breastmnist.npz#array=test_images&row=12       a picture of an array
"""

import posixpath
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from mmkd.base.images.cells import NpzImage, ParquetImage
from mmkd.base.images.source import FileImage, ImageError, ImageSource
from mmkd.base.places.remote import as_root

CELL = ("column", "row")
ITEM = (*CELL, "item")
ARRAY = ("array", "row")
FRAME = ("frame",)
TILE = ("x", "y", "side", "out")


class _Outside(ImageSource):
    """A uri that leaves the corpus' folder: named in the row, never opened."""

    def _encoded(self) -> bytes:
        raise ImageError("path leaves the corpus folder")


def image_source(root: str, uri: str, offset: int | None = None, length: int | None = None) -> ImageSource:
    """Return the source that a sample row names, below the corpus' `root` (a folder or URL prefix)."""
    inner, keys, values = split_fragment(uri)
    if leaves_root(root, inner):
        return _Outside(Path(inner))
    place = as_root(f"{root.rstrip('/')}/{inner}") if "://" in root else as_root(posixpath.join(root, inner))
    if keys in (CELL, ITEM):
        return ParquetImage(place, values[0], *map(int, values[1:]))
    if keys == ARRAY:
        return NpzImage(place, values[0], int(values[1]))
    if keys == FRAME:
        from mmkd.base.images.dicom import DicomFrame  # noqa: PLC0415 - an extra

        return DicomFrame(place, int(values[0]))
    if keys == TILE:
        from mmkd.base.images.slides import SlideTile  # noqa: PLC0415 - an extra

        x, y, side, out = map(int, values)
        return SlideTile(place, (x, y), side, out)
    return FileImage(place, offset, length)


def fragment(keys: tuple[str, ...], *values: str | int) -> str:
    """Return the end of a uri that names an image inside a file."""
    return "#" + urlencode(list(zip(keys, values, strict=True)))


def split_fragment(uri: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return the file, keys and values of a uri; no keys without a known fragment (`#` may be part of a file name)."""
    inner, mark, tail = uri.rpartition("#")
    if mark:
        pairs = parse_qsl(tail)
        keys, values = tuple(key for key, _ in pairs), tuple(value for _, value in pairs)
        named = keys in (CELL, ITEM, ARRAY)
        if (named or keys in (FRAME, TILE)) and all(value.isascii() and value.isdigit() for value in values[named:]):
            return inner, keys, values
    return uri, (), ()


def leaves_root(root: str, uri: str) -> bool:
    """Return True when `uri` does not stay below `root`; a user who wants that says `images: /`."""
    if "\0" in uri:
        return True
    if uri.startswith("/"):
        return root != "/" and not posixpath.normpath(uri).startswith(posixpath.normpath(root) + "/")
    return posixpath.normpath(uri).split("/", 1)[0] == ".." or "://" in uri
