"""Scores of pairs: one scorer a family. Each judges a block of rows against what it prepared, and keeps no state."""

from __future__ import annotations

from typing import Protocol

from mmkd.base.config import Frozen
from mmkd.store.selection.agreement import AgreementScorer
from mmkd.store.selection.block import Block, Columns, Floats
from mmkd.store.selection.cosine import CosineScorer
from mmkd.store.selection.rank import RankScorer
from mmkd.store.selection.rule import AgreementScore, CosineScore, RankScore, ZeroShotScore
from mmkd.store.selection.zero_shot import ZeroShotScorer


class Scorer(Protocol):
    """Scores of a block's pairs."""

    def score(self, block: Block) -> Floats:
        """float32 (n, T); what stands where a teacher has no pair does not matter."""


def make_scorer(spec: Frozen, columns: Columns, seed: int) -> Scorer:
    """The scorer of a score's settings."""
    if isinstance(spec, RankScore):
        return RankScorer(spec, columns, seed)
    if isinstance(spec, AgreementScore):
        return AgreementScorer(spec, columns, seed)
    if isinstance(spec, ZeroShotScore):
        return ZeroShotScorer(spec, columns, seed)
    assert isinstance(spec, CosineScore)
    return CosineScorer(spec, columns, seed)


def higher_is_better(spec: Frozen) -> bool:
    """False for ranks."""
    return not isinstance(spec, RankScore | ZeroShotScore)
