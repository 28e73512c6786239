"""Corruptions of pictures: suites of families with five severities each, made again bit for bit."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from mmkd.base.errors import ConfigError
from mmkd.base.images.corruptions.effects import EFFECTS, RANGES
from mmkd.base.images.recipe import Recipe, of_kind, read_recipe

HERE = Path(__file__).parent
SEVERITIES = (1, 2, 3, 4, 5)


class Corruptions(Recipe):
    """Recipe of corrupted pictures, every family at every severity, families in order: picture 1 is the first family at
    the first severity. All severities of a family begin with the same random numbers: the same noise and places, but
    for `shot_noise`, `bubble` and `characters`, which draw by their strength. Random numbers are NumPy's: the same bits
    as long as its generator has the same stream."""

    option: ClassVar = "--corrupt"

    kind: Literal["corruptions"] = "corruptions"
    suite: str
    seed: int = Field(default=0, ge=0)
    side: int | None = Field(default=224, gt=0)
    """Pixels of the shorter side that a larger picture is resized to first: strengths are for pictures of MedMNIST-C's
    size. Null leaves it as it is."""
    severities: tuple[int, ...] = SEVERITIES
    families: dict[str, tuple[Any, ...]] = Field(min_length=1)
    """Strength at severities 1 to 5, by family: the name of an effect, with `_up` or `_down` behind it where a suite
    has both."""

    @model_validator(mode="before")
    @classmethod
    def _counted(cls, given: dict[str, Any]) -> dict[str, Any]:
        families, severities = given.get("families"), given.get("severities", SEVERITIES)
        sized = isinstance(families, dict) and isinstance(severities, list | tuple)
        return {"count": max(1, len(families) * len(severities)) if sized else 1} | given  # type: ignore[arg-type]

    def faults(self) -> Iterator[str]:
        yield from (
            f"severity {one} does not exist; expected some of 1 to 5" for one in self.severities if not 0 < one < 6
        )
        if not self.severities or len(set(self.severities)) < len(self.severities):
            yield "severities are not one or more different ones of 1 to 5"
        for name, strengths in self.families.items():
            if _effect(name) not in EFFECTS:
                yield f"no family {name!r}; there are {', '.join(EFFECTS)}"
            elif len(strengths) != len(SEVERITIES):
                yield f"{name} has {len(strengths)} strengths, expected one for each severity from 1 to 5"
            else:
                yield from _strength_faults(name, strengths)
        if self.count != len(self.conditions):
            yield f"count is {self.count}, but there are {len(self.conditions)} families and severities"

    def __hash__(self) -> int:
        return hash((self.suite, self.seed, self.count))  # a mapping has none

    @property
    def conditions(self) -> list[tuple[str, int]]:
        """Family and severity of every picture of an image, in their order."""
        return [(family, severity) for family in self.families for severity in self.severities]

    def picture(self, image: Image.Image, key: str, number: int) -> Image.Image:
        """As `Recipe.picture`. Raises ImageError for a gray picture and a family that needs colors."""
        family, severity = self.conditions[number - 1]
        if self.side is not None and min(image.size) > self.side:
            share = self.side / min(image.size)
            size = tuple(max(1, round(length * share)) for length in image.size)
            image = image.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
        words = blake2b(f"{self.seed} {family} {key}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
        rng = np.random.default_rng(np.frombuffer(words, dtype="<u4"))
        return EFFECTS[_effect(family)](image, self.families[family][severity - 1], rng)


def _effect(family: str) -> str:
    return family.removesuffix("_up").removesuffix("_down")


def _strength_faults(name: str, strengths: Sequence[Any]) -> Iterator[str]:
    ranges = RANGES[_effect(name)]
    wanted = " and ".join(f"a {'whole ' * (kind is int)}number from {low:g} to {high:g}" for kind, low, high in ranges)
    for strength in strengths:
        numbers = strength if isinstance(strength, list | tuple) else [strength]
        right = isinstance(strength, list | tuple) == (len(ranges) > 1) and len(numbers) == len(ranges)
        for one, (kind, low, high) in zip(numbers, ranges, strict=False):
            right &= type(one) in (int, kind) and low <= one <= high
        if not right:
            yield f"{name} cannot have the strength {strength!r}: expected {'a list: ' * (len(ranges) > 1)}{wanted}"


def find_corruptions(name: str) -> Corruptions:
    """Return a suite, given a YAML file or the name of a shipped one. Raises ConfigError if it is neither, or has a
    wrong value."""
    known = {path.stem: path for path in sorted(HERE.glob("*.yaml"))}
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else known.get(name)
    if path is None:
        raise ConfigError(f"no corruptions {name!r}: neither a YAML file nor one of {', '.join(known)}")
    found = read_recipe({"suite": path.stem} | of_kind("corruptions", path), path)
    assert isinstance(found, Corruptions)
    return found
