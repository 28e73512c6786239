"""Pictures made of a corpus' images, such as views for training: a recipe says how, a store keeps it beside their
features, and the same function makes them again, bit for bit."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from mmkd.base.config import Frozen, read_mapping, validated
from mmkd.base.errors import ConfigError, UserError
from mmkd.base.images.source import ImageSource

_KINDS = {"corruptions": "mmkd.base.images.corruptions:Corruptions", "views": "mmkd.base.images.views:Views"}


class Recipe(Frozen):
    """How `count` pictures of each image are made. They depend on the recipe, the key of the image's row and the number
    of the picture alone, so that a row keeps its pictures when it moves to another store."""

    option: ClassVar[str]
    """Of `mmkd extract`, which asks for it."""

    kind: str
    count: int = Field(gt=0)

    def picture(self, image: Image.Image, key: str, number: int) -> Image.Image:
        """Return picture `number`, from 1 to `count`, of a decoded image; both are in mode `L` or `RGB`."""
        raise NotImplementedError

    def row_key(self, key: str, number: int) -> str:
        """Return the key of a picture's row by that of its image's row."""
        return f"{key}#{self.kind}-{number}"

    def source(self, image: ImageSource, row_key: str, number: int) -> ImageSource:
        """Return the source of a picture by that of its image and the key of its own row."""
        return DerivedImage(image.place, image, self, row_key.removesuffix(self.row_key("", number)), number)


@dataclass(frozen=True)
class DerivedImage(ImageSource):
    """A picture that a recipe makes of an image: the bytes of the image, and what to do with it once it is decoded."""

    image: ImageSource
    recipe: Recipe
    key: str
    """Of the image's row."""
    number: int

    @property
    def origin(self) -> ImageSource:
        return self.image

    def read(self) -> bytes:
        return self.image.read()

    def picture(self, image: Image.Image) -> Image.Image:
        return self.recipe.picture(image, self.key, self.number)


def parse_recipe(kind: str, text: str) -> Recipe:
    """Return the recipe that `text` asks for: a number of pictures, or a YAML file. Raises ConfigError for another
    text, a file that cannot be read, or a wrong value."""
    if text.isdecimal():
        return read_recipe({"kind": kind, "count": int(text)}, f"--{kind}")
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--{kind} is {text!r}, expected a number of pictures, or a YAML file that holds a `count`")
    return read_recipe(of_kind(kind, path), path)


def of_kind(kind: str, path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file with this `kind`. Raises ConfigError if it names another, or cannot be read."""
    content = {"kind": kind} | read_mapping(path)
    if content["kind"] != kind:
        raise ConfigError(f"{path}: kind is {content['kind']!r}, expected {kind!r}; leave it out, or name another file")
    return content


def read_recipe(content: Mapping[str, Any], where: Path | str) -> Recipe:
    """Return the recipe of a mapping with its `kind`; `corpus`, which a record adds, is passed over. Raises ConfigError
    for a wrong value; UserError for a kind that this mmkd does not know."""
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"{where}: kind {kind!r} is not among {', '.join(_KINDS)}; install a newer mmkd")
    module, _, name = _KINDS[kind].partition(":")
    found: Recipe = validated(
        getattr(importlib.import_module(module), name), {k: v for k, v in content.items() if k != "corpus"}, where
    )
    return found
