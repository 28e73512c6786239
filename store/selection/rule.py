"""Selection rules as frozen models: leaves that judge a pair, nodes that combine, count and rank.

A *pair* is one row's image and caption as one teacher sees them. Every rule gives yes or no for each pair:

    seed: 0                     # of every random draw
    teachers: [plip, quiltnet]  # columns to judge; by default all of the store
    keep:
      all:
        - rank: {at_most: 3, among: 256}
        - not: {where: "modality = 'plot'"}
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from mmkd.base.config import Frozen, OneOf, read_mapping, validated
from mmkd.store.layout import Tower

OTHERS = "others"
"""Key of a mapping over teachers for all teachers it does not name."""


class PairScore(Frozen):
    """Base of scores of a pair."""

    higher_is_better: ClassVar[bool] = True


class CosineScore(PairScore):
    """Cosine between a row's image and its own caption."""


class RankScore(PairScore):
    """Rank of the true caption among random captions, 1 the best; likewise of the true image."""

    higher_is_better: ClassVar[bool] = False

    among: int = Field(default=256, ge=2, le=16384)
    """Random captions (and images) it competes with, the same for all rows of a teacher."""
    direction: Literal["both", "image_to_text", "text_to_image"] = "both"
    """`both`: the worse of the two ranks."""


class AgreementScore(PairScore):
    """Share of a row's k nearest neighbors, among random rows, that this teacher shares with the others. The mutual
    k-nearest-neighbor metric of Huh et al. 2024 (arXiv 2405.07987), averaged over the other teachers."""

    k: int = Field(default=10, ge=1)
    among: int = Field(default=1024, ge=2, le=16384)
    tower: Tower = "image"

    def faults(self) -> Iterator[str]:
        if self.k >= self.among:
            yield f"k is {self.k} of {self.among} rows: every row is a neighbor; lower k"


class ZeroShotScore(PairScore):
    """Rank of the row's own label when its image is compared with prompts for every label."""

    higher_is_better: ClassVar[bool] = False

    prompts: Path
    """Store of prompts: rows with a text, the label in column `label`, the same teachers. From the rule's folder."""
    label: str = "modality"
    """Sample column that holds the truth, in both stores."""


class CosineRule(OneOf):
    """Keep pairs whose cosine is high enough: by value, or relative to the teacher's other pairs."""

    at_least: float | dict[str, float] | None = None
    """Lowest cosine kept; a mapping gives one per teacher, `others` for those not named."""
    quantile: float | None = Field(default=None, gt=0, lt=1)
    """Drop this share of each teacher's pairs, the lowest."""


class RankRule(RankScore):
    """Keep pairs whose true partner ranks high enough."""

    at_most: int = Field(ge=1)

    def faults(self) -> Iterator[str]:
        if self.at_most > self.among:
            yield f"rank at most {self.at_most} among {self.among} holds for every pair; lower at_most"


class AgreementRule(AgreementScore):
    """Keep pairs whose teacher has the same neighbors as the others."""

    at_least: float = Field(gt=0, le=1)


class ZeroShotRule(ZeroShotScore):
    """Keep pairs whose teacher recognizes the row's label."""

    top: int = Field(default=1, ge=1)


class HomeRule(Frozen):
    """Keep a teacher's pairs on the modalities it was trained for."""

    teachers: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Teacher to its values of `column`."""
    column: str = "modality"
    unlisted: Literal["keep", "drop"] = "keep"
    """Pairs of teachers that are not named; `keep` suits generalists."""


class Score(OneOf):
    """The score by which pairs are ranked, best first."""

    cosine: CosineScore | None = None
    rank: RankScore | None = None
    agreement: AgreementScore | None = None
    zero_shot: ZeroShotScore | None = None


class _Ranked(Frozen):
    by: Score = Score(cosine=CosineScore())
    scale: Literal["quantile", "raw"] = "quantile"
    """`quantile`: each score is replaced by the share of the same teacher's pairs that it is not below, as cosines
    of different teachers cannot be compared; `raw`: as it is."""


class TeachersRule(_Ranked):
    """Drop rows kept for too few teachers; of many, keep the best."""

    of: "Rule"
    at_least: int = Field(default=1, ge=1)
    at_most: int | None = Field(default=None, ge=1)

    def faults(self) -> Iterator[str]:
        if self.at_most is not None and self.at_most < self.at_least:
            yield f"at_most {self.at_most} is below at_least {self.at_least}"


class PairsRule(_Ranked):
    """Keep a number of pairs: the best of those that `of` keeps. The threshold is found and printed."""

    of: "Rule | None" = None
    target: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, lt=1)

    def faults(self) -> Iterator[str]:
        if (self.target is None) == (self.share is None):
            yield "give either target (a number of pairs) or share (of the available ones)"


class Rule(OneOf):
    """Exactly one of these keys."""

    all: tuple["Rule", ...] | None = Field(default=None, min_length=1)
    any: tuple["Rule", ...] | None = Field(default=None, min_length=1)
    none: "Rule | None" = Field(default=None, alias="not")
    cosine: CosineRule | None = None
    rank: RankRule | None = None
    zero_shot: ZeroShotRule | None = None
    agreement: AgreementRule | None = None
    home: HomeRule | None = None
    where: str | None = None
    """Condition over the sample table; see `mmkd.base.conditions`."""
    teachers: TeachersRule | None = None
    pairs: PairsRule | None = None

    def children(self) -> tuple["Rule", ...]:
        if self.kind in ("all", "any"):
            return tuple(self.chosen)
        if self.kind == "none":
            return (self.chosen,)
        below = getattr(self.chosen, "of", None)
        return (below,) if below is not None else ()


class SelectionRule(Frozen):
    """Content of a rule file."""

    keep: Rule
    teachers: tuple[str, ...] = ()
    """Teachers to judge, in the store's order; empty for all."""
    seed: int = Field(default=0, ge=0)


def load_rule(path: Path) -> SelectionRule:
    """Read a rule's YAML; prompt stores are relative to the file. Raises ConfigError for an unfit file or key."""
    content = read_mapping(path)
    _place_prompts(content, path.resolve().parent)
    return validated(SelectionRule, content, path)


def _place_prompts(content: object, here: Path) -> None:
    """Make the paths of `prompts` absolute, anywhere in the rule."""
    if isinstance(content, list):
        for entry in content:
            _place_prompts(entry, here)
    elif isinstance(content, dict):
        for name, value in content.items():
            if name == "prompts" and isinstance(value, str):
                content[name] = str(here / value)
            else:
                _place_prompts(value, here)
