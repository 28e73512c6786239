"""What the search for copies found, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from mmkd.base.text import one_line

SHOWN = 3
"""Pairs that the text shows of each comparison; JSON has all."""


@dataclass(frozen=True)
class Pair:
    """A row of an evaluation set and its copy.

    cosine: of their features, for the kind `features`. bits: in which their hashes differ, for the kind `hash`.
    """

    key: str
    other: str
    kind: Literal["exact", "hash", "features"]
    cosine: float | None = None
    bits: int | None = None

    def __str__(self) -> str:
        """One line."""
        closeness = {"exact": "", "hash": f" {self.bits} bits", "features": f" {self.cosine}"}[self.kind]
        return f"{self.kind}{closeness}: {self.key} = {self.other}"


@dataclass(frozen=True)
class Near:
    """Rows with a near copy by one measure.

    compared: rows that have what is compared. found: rows whose nearest neighbour is within the threshold; a row with
    an exact copy is not counted. typical, nearest: median and best value over the nearest neighbours of all rows:
    a cosine, or a number of bits.
    """

    compared: int
    found: int
    typical: float | None
    nearest: float | None


@dataclass(frozen=True)
class Overlap:
    """Rows of one split that have a copy in another place.

    images: rows with an image. exact: rows with a copy of the same bytes. features, hash: near copies by either
    measure; hash is None where hashes were not asked for.
    """

    dataset: str
    split: str
    against: str
    images: int
    exact: int
    features: Near
    hash: Near | None
    pairs: tuple[Pair, ...]

    @property
    def found(self) -> bool:
        """Whether there is any copy."""
        return bool(self.exact + self.features.found + (self.hash.found if self.hash else 0))

    def lines(self) -> list[str]:
        """For people: counts, how near the nearest neighbours are in general, and the first pairs."""
        place = "inside (other groups)" if self.against == self.split else f"in {self.against}"
        by_hash = f"{self.hash.found} near by hash, " if self.hash else ""
        near = f"{self.features.found} near by features"
        lines = [f"{self.dataset} {self.split} {place}: {self.exact} exact, {by_hash}{near} of {self.images} images"]
        scale = []
        if self.features.typical is not None:
            scale.append(f"cosine {self.features.typical:.3f} and {self.features.nearest:.3f}")
        if self.hash is not None and self.hash.typical is not None:
            scale.append(f"{self.hash.typical:.0f} and {self.hash.nearest:.0f} bits")
        if scale:
            lines.append(f"  nearest neighbours, median and closest: {'; '.join(scale)}")
        if self.features.compared < self.images:
            lines.append(f"  {self.images - self.features.compared} images have no features")
        if self.hash is not None and self.hash.compared < self.images:
            lines.append(f"  {self.images - self.hash.compared} images have no hash: gone, changed, or of one colour")
        lines += [f"  {pair}" for pair in self.pairs[:SHOWN]]
        if len(self.pairs) > SHOWN:
            lines.append(f"  ... and {len(self.pairs) - SHOWN} more; --json lists all")
        return lines


@dataclass(frozen=True)
class LeakageReport:
    """All comparisons of a suite. bits is None where hashes were not asked for."""

    suite: str
    model: str
    cosine: float
    bits: int | None
    training: str | None
    overlaps: tuple[Overlap, ...]

    @property
    def clean(self) -> bool:
        """Whether no copy was found anywhere."""
        return not any(one.found for one in self.overlaps)

    def text(self) -> str:
        """A few lines a comparison."""
        measures = ["exact copies by SHA-256", f"near copies by cosine >= {self.cosine:g} of {self.model}"]
        if self.bits is not None:
            measures.append(f"and by perceptual hashes that differ in {self.bits} of 64 bits or fewer")
        corpus = f"training corpus {self.training}" if self.training else "no training corpus named"
        lines = [f"suite {self.suite}: {', '.join(measures)}; {corpus}"]
        return "\n".join(map(one_line, [*lines, *(line for one in self.overlaps for line in one.lines())]))

    def json(self) -> str:
        """The same with all pairs, as JSON."""
        return json.dumps(asdict(self) | {"clean": self.clean}, indent=1)
