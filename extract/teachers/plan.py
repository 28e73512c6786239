"""A teacher's files, found and parsed but not loaded: the basis of a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.fingerprint import settings_sha256
from mmkd.extract.teachers.loaded import LoadedTeacher, check_digest
from mmkd.extract.teachers.protocol import Teacher
from mmkd.extract.teachers.source import Source
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import read_temperature, weights_identity
from mmkd.store import Preprocessing, TeacherCard

Options = TypeVar("Options", bound=BaseModel)

LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "tokenizers", "pillow")


@dataclass(frozen=True)
class Plan:
    """Everything `describe` needs, and what `build` starts from."""

    spec: TeacherSpec
    loader: str
    weights: Mapping[str, Path]
    """Files that hold the weights, under the part each plays."""
    preprocessing: Preprocessing
    tokenizer: TokenizerPlan
    dim: int
    vocabulary: int
    """Token embeddings of the text tower."""
    configuration: dict[str, Any] = field(default_factory=dict)
    """Properties besides the weights that affect the forward pass: activation, pooling, heads, masks. JSON."""
    companions: dict[str, Path] = field(default_factory=dict)
    """Configuration files that the loader reads beside the weights, by name."""
    text_config: dict[str, Any] = field(default_factory=dict)
    """config.json of a Hugging Face text tower, where there is one."""
    material: dict[str, Any] = field(default_factory=dict)
    """Further input of `build`; not part of the identity."""

    def card(self) -> TeacherCard:
        """Return the card of this teacher; hashes the files the first time."""
        # The store's card has one field for the code path; the hash makes two activations over the same
        # weights two teachers.
        settings = self.configuration | ({} if self.spec.precision == "fp32" else {"precision": self.spec.precision})
        return TeacherCard(
            slug=self.spec.slug,
            source=self.spec.source,
            revision=self.spec.revision,
            weights_sha256=self._identity(),
            preprocessing=self.preprocessing,
            tokenizer_sha256=self.tokenizer.sha256(),
            context_length=self.tokenizer.context_length,
            dim=self.dim,
            loader=f"{self.loader}:{settings_sha256(settings)[:12]}",
            logit_scale=self._temperature(),
            licence=self.spec.licence,
            versions={name: version(name) for name in LIBRARIES},
        )

    def _identity(self) -> str:
        found, wanted = weights_identity(self.weights), self.spec.weights_sha256
        if wanted and found != wanted.lower():
            raise TeacherError(
                f"teacher {self.spec.slug!r}: weights have sha256 {found}, expected {wanted}; "
                "download them again, or correct the card"
            )
        return found

    def _temperature(self) -> float | None:
        scales = [read_temperature(path, self.spec.trust_pickle) for path in self.weights.values()]
        return next((scale for scale in scales if scale is not None), None)


def read_options(spec: TeacherSpec, model: type[Options]) -> Options:
    """`spec.options` as the loader's model. Raises TeacherError for an option that the loader does not have, or a value
    that does not fit."""
    try:
        return model.model_validate(spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(model.model_fields) or "none"
        raise TeacherError(
            f"teacher {spec.slug!r}: option {name!r}: {first['msg']}; this loader has: {known}"
        ) from error


class TeacherLoader(Protocol):
    """Turns a spec into a card and into an encoder. What an entry point of the group `mmkd.teachers` must be."""

    def describe(self, spec: TeacherSpec) -> TeacherCard:
        """Find and hash the files; build no model."""

    def load(self, spec: TeacherSpec, card: TeacherCard, device: torch.device) -> Teacher:
        """Build the encoder that `card` describes, on `device`."""


@dataclass(frozen=True)
class FileLoader:
    """A loader made of two steps: understand the files, then build the model from them."""

    plan: Callable[[TeacherSpec], Plan]
    build: Callable[[Plan], nn.Module]
    """Returns a model with `encode_image`, `encode_text` and, if it has one, `logit_scale`; strictly loaded."""
    recognizes: Callable[[TeacherSpec, Source], bool] = lambda spec, source: False
    """Return True if `loader: auto` chooses this loader; reads small files only."""
    reads: str = ""
    """Description of such a place, for the message where no loader recognizes one."""

    def describe(self, spec: TeacherSpec) -> TeacherCard:
        """Return the card of the current files."""
        return self.plan(spec).card()

    def load(self, spec: TeacherSpec, card: TeacherCard, device: torch.device) -> Teacher:
        """Build the model. Raises TeacherError if the files are no longer those of the card, or do not fit the
        architecture."""
        plan = self.plan(spec)
        check_digest(plan.card(), card)
        tokenizer = plan.tokenizer.build()
        tokenizer.check(spec.slug, plan.vocabulary)
        # Building fills the weights with random numbers before the real ones come: leave the caller's generator alone.
        with torch.random.fork_rng(devices=[]):
            model = self.build(plan)
        return LoadedTeacher(card, spec.precision, device, model, tokenizer)
