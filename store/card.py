"""The teacher card: who made these features, exactly enough to refuse mixing them with others'."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator

from mmkd.store.layout import check_slug


class Preprocessing(BaseModel):
    """How an image becomes a tensor: the fields of open_clip's `preprocess_cfg` plus the colour mode."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """`shortest` (shorter side to size, centre crop), `longest` (pad) or `squash`, as open_clip names them."""
    fill: int = 0
    """Grey level of padding, 0 to 255."""
    colour: str = "RGB"
    """PIL mode in which the image is resized last: `RGB`, or `L` for a teacher that sees one channel thrice."""


class TeacherCard(BaseModel):
    """One teacher as the store knows it.

    `digest` is the identity: two cards with equal digest give equal features. It covers weights,
    preprocessing, tokenizer and widths, and leaves out what cannot change a feature (where the files
    lay, the licence, library versions).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slug: str
    source: str
    """Where the weights came from, as a user would type it: `local-dir:...`, `hf-hub:...`."""
    revision: str = ""
    weights_sha256: str
    preprocessing: Preprocessing
    tokenizer_sha256: str
    context_length: int = Field(gt=0)
    """Tokens a caption is cut to."""
    dim: int = Field(gt=0)
    """Width D of the shared image-text space, as stored."""
    loader: str = "open_clip"
    """Code path that turns the files into features (pooling, masks and activations are its business)."""
    normalised: bool = False
    """True when stored features have unit norm; false when they are the encoder's own output."""
    logit_scale: float | None = None
    """exp of the learned temperature: cosine times this are the teacher's logits."""
    licence: str = "not stated"
    versions: dict[str, str] = Field(default_factory=dict)
    """Libraries that ran the teacher, name to version."""

    @field_validator("slug")
    @classmethod
    def _slug_is_a_folder_name(cls, slug: str) -> str:
        return check_slug(slug)

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over everything that can change a feature."""
        identity = self.model_dump(
            include={
                "weights_sha256",
                "preprocessing",
                "tokenizer_sha256",
                "context_length",
                "dim",
                "loader",
                "normalised",
            }
        )
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @classmethod
    def from_attributes(cls, attributes: dict[str, object]) -> TeacherCard:
        """Read a card back from Zarr attributes, where the digest stands beside the fields it covers."""
        return cls.model_validate({name: value for name, value in attributes.items() if name != "digest"})
