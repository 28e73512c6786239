"""What is minimised, as a run's YAML says it: terms and their weights, whom to believe, and where the two meet."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mmkd.base.config import Frozen
from mmkd.distill.losses import FeatureKind

TeacherTerm = Literal["feature", "cross", "bank", "relational"]
TEACHER_TERMS: tuple[TeacherTerm, ...] = ("feature", "cross", "bank", "relational")


class BankConfig(Frozen):
    """Stored teacher features that every step contrasts with, beside those of the batch."""

    size: int = Field(default=0, ge=0)
    """Rows; the whole data set when it has fewer. Memory: 8 bytes for each row and unit of teacher width."""
    refresh: int = Field(default=256, ge=0)
    """Rows that are replaced each step, in an order of their own, so that all rows come round."""


class LossConfig(Frozen):
    """`total = sum of weight * term`; the equations stand in docs/losses.md."""

    task: float = Field(default=1.0, ge=0)
    feature: float = Field(default=1.0, ge=0)
    cross: float = Field(default=1.0, ge=0)
    bank: float = Field(default=0.0, ge=0)
    """Of the cross loss with the bank's rows as further keys."""
    relational: float = Field(default=0.0, ge=0)
    feature_kind: FeatureKind = "cosine"
    bank_rows: BankConfig = BankConfig()
    balance: Literal["none", "equal", "learned"] = "none"
    """`equal`: every teacher's part of a term is scaled to the same size; `learned`: by a learned variance of each."""
    unit_teachers: bool = True
    """Teacher features are brought to norm 1. MMKD-CLIP's release takes them as stored: false."""
    cross_scale: float | None = Field(default=None, gt=0)
    """Scale of cross and bank logits; learned for each teacher when not given. The release: constant 2.659."""
    equal_captions: bool = True
    """Rows with one caption are positives of each other. The release counts them as negatives: false."""
    mixed_teachers: bool = False
    """One set of keys in which each row is of the teacher drawn for it, as in the release."""

    @model_validator(mode="after")
    def _terms_can_be_learned_from(self) -> LossConfig:
        if not self.task and not self.teacher_terms:
            raise ValueError("every weight is 0, so nothing would be learned; give one of them a positive value")
        if (self.bank > 0) != (self.bank_rows.size > 0):
            raise ValueError("`bank` and `bank_rows.size` go together: give both a positive value, or neither")
        if self.mixed_teachers and (self.bank > 0 or self.balance != "none"):
            raise ValueError("`mixed_teachers` mixes the spaces of teachers: it goes without `bank` and `balance`")
        return self

    @property
    def teacher_terms(self) -> tuple[TeacherTerm, ...]:
        """The terms with weight that need what teachers said."""
        return tuple(name for name in TEACHER_TERMS if getattr(self, name) > 0)


class PolicyConfig(Frozen):
    """Which of a sample's available teachers take part in a step, and with what share."""

    kind: Literal["all", "one", "weighted", "best"] = "all"
    """`one`: a teacher drawn anew for each sample and epoch; `weighted`: in proportion to `weights`; `best`: those
    whose own image and caption agree most, by the teacher's own standard."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Teacher to weight, for `weighted`; teachers that are not named have weight 1."""
    best: int = Field(default=1, gt=0)
    """Teachers of a sample, for `best`."""
    drop: float = Field(default=0.0, ge=0, lt=1)
    """Chance to leave out a teacher of a sample, but never the one with the largest loss (UNIC, arXiv 2408.05088)."""

    @model_validator(mode="after")
    def _weights_are_used(self) -> PolicyConfig:
        if bool(self.weights) != (self.kind == "weighted"):
            raise ValueError("`weights` and `kind: weighted` go together")
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError("weights must not be negative")
        return self


class HeadConfig(Frozen):
    """How the student's width and a teacher's are brought together."""

    kind: Literal["linear", "mlp", "none"] = "linear"
    """From the student to each teacher; `none` compares features as they are, so widths must agree."""
    alignment: Path | None = None
    """File of `mmkd align`: a fixed map of each teacher's features, applied first."""
