"""One alignment, as `mmkd align STORE RUN.yaml` reads it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from mmkd.base.config import Frozen, OneOf, read_mapping, validated
from mmkd.distill.config import Names, Share

Center = Literal["tower", "shared", "none"]
"""Subtracted before a map: each tower's own mean (closes the gap between image and text), one of both, or nothing."""


class NoneSettings(Frozen):
    """No map: every teacher keeps its width, and the student has a head for each."""


class PCASettings(Frozen):
    """The directions of largest variance."""

    center: Center = "tower"


class WhiteningSettings(Frozen):
    """Equal variance in every channel."""

    kind: Literal["phi_s", "full"] = "phi_s"
    """`phi_s`: a rotation and one factor per teacher, nothing is distorted; `full`: every direction has variance 1."""
    center: Center = "tower"
    floor: float = Field(default=1e-4, gt=0, lt=1)
    """`full` only: directions of less than this share of the largest variance are scaled as if they had it."""


class ProcrustesSettings(Frozen):
    """Rotations of all teachers onto one of them."""

    reference: str | None = None
    """The teacher whose space is kept (cut to its main directions); by default the one with most pairs."""
    center: Center = "tower"
    scale: bool = True
    """Fit one factor per teacher beside the rotation."""


class TrainingSettings(Frozen):
    """AdamW on features alone, with a cosine decay to zero."""

    steps: PositiveInt = 500
    batch_size: int = Field(default=1024, gt=1)
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0


class JointSettings(TrainingSettings):
    """Linear maps that are trained to agree."""

    temperature: PositiveFloat = 0.05
    center: Center = "tower"


class AutoencoderSettings(TrainingSettings):
    """The autoencoder released with MMKD-CLIP. Its hidden width, rate and epochs are not known: these are ours."""

    hidden: int = Field(default=1024, gt=0, le=65_536)
    dropout: Share = 0.2
    noise: NonNegativeFloat = 0.01


class Method(OneOf):
    """Exactly one of these keys."""

    none: NoneSettings | None = None
    pca: PCASettings | None = None
    whitening: WhiteningSettings | None = None
    procrustes: ProcrustesSettings | None = None
    joint: JointSettings | None = None
    autoencoder: AutoencoderSettings | None = None


class AlignConfig(Frozen):
    """Everything that decides an alignment."""

    out: Path
    """The file to write, `.safetensors`; relative to the YAML file."""
    method: Method
    dim: int = Field(default=512, gt=1, le=65_536)
    """Common width D, the student's."""
    teachers: Names = ()
    """Slugs to align; empty for all of the store."""
    selection: str | None = None
    """Fit on the pairs that this selection keeps."""
    where: str | None = None
    """Fit and judge on rows that fit this condition; see `mmkd.base.conditions`."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the captions that are held out: no row is judged whose caption was fitted on."""
    judge_rows: int = Field(default=2000, ge=20)
    """Most held-out rows to judge by, the gallery of the retrieval."""
    unit_input: bool = True
    """Scale features to norm 1 first."""
    seed: int = Field(default=0, ge=0, lt=2**63)


def load_align(path: Path) -> AlignConfig:
    """Read an alignment's YAML. Raises ConfigError if it is unreadable, or for an unknown or unfit key."""
    config = validated(AlignConfig, read_mapping(path), path)
    return config.model_copy(update={"out": path.resolve().parent / config.out})
