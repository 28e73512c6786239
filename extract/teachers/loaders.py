"""Loaders: a teacher's files, found and parsed, become a card and an encoder. Ours are found by name or by the files
present, a user's by entry point."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmkd.base.errors import TeacherError, cause, did_you_mean, faults_as
from mmkd.extract.teachers.loaded import LoadedTeacher, out_of_memory
from mmkd.extract.teachers.source import Source, read_json, source_of
from mmkd.extract.teachers.spec import AUTO, HF_HUB, LOCAL_DIR, Teacher, TeacherSpec
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import read_temperature, weights_identity
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.hierarchy import canonical_sha256
from mmkd.store.layout import TOWERS, Tower

LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "tokenizers", "pillow")
_IDENTITY = "weights_sha256 preprocessing tokenizer_sha256 context_length towers dim loader normalized".split()  # noqa: SIM905

LOADERS = {
    "open_clip": "mmkd.extract.teachers.open_clip_model",
    "transformers": "mmkd.extract.teachers.transformers_model",
    "timm": "mmkd.extract.teachers.timm_model",
    "conch": "mmkd.extract.teachers.conch",
    "pmc_clip": "mmkd.extract.teachers.pmc_clip",
    "medclip": "mmkd.extract.teachers.medclip",
}
"""Loaders by name, and the modules whose `LOADER` they are; `auto` tries them in this order."""

Options = TypeVar("Options", bound=BaseModel)


@dataclass(frozen=True)
class Plan:
    """A teacher's files, understood but not loaded: all that its card needs, and what `build` starts from."""

    spec: TeacherSpec
    loader: str
    weights: Mapping[str, Path]
    """Files that hold the weights, under the part each plays."""
    preprocessing: Preprocessing | None
    """None without an image tower."""
    tokenizer: TokenizerPlan | None
    """None without a text tower."""
    dim: int
    vocabulary: int = 0
    """Token embeddings of the text tower."""
    configuration: dict[str, Any] = field(default_factory=dict)
    """Properties besides the weights that affect the forward pass: activation, pooling, heads, masks. JSON."""
    companions: dict[str, Path] = field(default_factory=dict)
    """Configuration files that the loader reads beside the weights, by name."""
    text_config: dict[str, Any] = field(default_factory=dict)
    """config.json of a Hugging Face text tower, where there is one."""
    material: dict[str, Any] = field(default_factory=dict)
    """Further input of `build`; not part of the identity."""

    @property
    def where(self) -> str:
        """The weight files, for messages."""
        return ", ".join(str(path) for path in self.weights.values())

    def card(self) -> TeacherCard:
        """Return the card of this teacher; hashes the files the first time. Raises TeacherError if the weights are not
        those that the spec's `weights_sha256` names."""
        found, wanted = weights_identity(self.weights), self.spec.weights_sha256
        if wanted and found != wanted.lower():
            raise self.spec.error(
                f"weights have sha256 {found}, expected {wanted}; download them again, or correct the card"
            )
        # The store's card has one field for the code path; the hash makes two activations over the same
        # weights two teachers.
        settings = self.configuration | ({} if self.spec.precision == "fp32" else {"precision": self.spec.precision})
        scales = [read_temperature(path, self.spec.trust_pickle) for path in self.weights.values()]
        has: dict[Tower, bool] = {"image": self.preprocessing is not None, "text": self.tokenizer is not None}
        if lacking := [tower for tower in self.spec.towers if not has[tower]]:
            raise self.spec.error(f"towers asks for the {lacking[0]} tower, which the files do not have; leave it out")
        towers = tuple(tower for tower in TOWERS if tower in (self.spec.towers or has) and has[tower])
        tokenizer = self.tokenizer if "text" in towers else None
        return TeacherCard(
            slug=self.spec.slug,
            source=self.spec.source,
            revision=self.spec.revision,
            weights_sha256=found,
            towers=towers,
            preprocessing=self.preprocessing if "image" in towers else None,
            tokenizer_sha256=tokenizer.sha256() if tokenizer else "",
            context_length=tokenizer.context_length if tokenizer else 0,
            dim=self.dim,
            loader=f"{self.loader}:{canonical_sha256(settings)[:12]}",
            logit_scale=next((scale for scale in scales if scale is not None), None),
            license=self.spec.license,
            versions={name: version(name) for name in LIBRARIES},
        )


def read_options(spec: TeacherSpec, model: type[Options]) -> Options:
    """Return `spec.options` as the loader's model. Raises TeacherError for an option that the loader does not have, or
    a value that does not fit."""
    try:
        return model.model_validate(spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(model.model_fields) or "none"
        raise spec.error(f"option {name!r}: {first['msg']}; this loader has: {known}") from error


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
    """Returns a model with `encode_image`, `encode_text`, or both, as the files have towers; strictly loaded."""
    recognizes: Callable[[TeacherSpec, Source, dict[str, Any]], bool] = lambda spec, source, config: False
    """Return True if `loader: auto` chooses this loader; reads small files only. `config`: config.json, {} without."""
    reads: str = ""
    """Description of such a place, for the message where no loader recognizes one."""

    def describe(self, spec: TeacherSpec) -> TeacherCard:
        return self.plan(spec).card()

    def load(self, spec: TeacherSpec, card: TeacherCard, device: torch.device) -> Teacher:
        """Build the model. Raises TeacherError if the files are not the card's, or do not fit the architecture."""
        plan = self.plan(spec)
        # How features are kept is the run's choice; the files have no say in it.
        now = plan.card().with_encoding(card.encoding)
        if now.digest != card.digest:
            changed = ", ".join(name for name in _IDENTITY if getattr(now, name) != getattr(card, name))
            raise TeacherError(
                f"teacher {card.slug!r} is no longer what its card says: digest {now.digest} at {now.source}, expected "
                f"{card.digest} (different: {changed}); put the former files back or use another name"
            )
        tokenizer = plan.tokenizer.build() if plan.tokenizer is not None and "text" in card.towers else None
        if tokenizer is not None:
            tokenizer.check(spec.slug, plan.vocabulary)
        # Building fills the weights with random numbers before the real ones come: leave the caller's generator alone.
        with torch.random.fork_rng(devices=[]):
            model = self.build(plan)
        teacher = LoadedTeacher(card, spec.precision, device, model, tokenizer)
        teacher.row_flops = _try_once(teacher.in_precision("fp32"))
        return teacher


def _try_once(teacher: LoadedTeacher) -> dict[tuple[Tower, int], float]:
    """Run one gray image, one empty caption, or both: many towers take one size only. Returns
    `LoadedTeacher.row_flops`. Raises TeacherError if a tower does not take what the configuration says, or gives
    features of another width."""
    card = teacher.card
    runs: list[tuple[Tower, int, torch.Tensor, tuple[str, str]]] = []
    if (look := card.preprocessing) is not None:
        height, width = look.image_size
        image = torch.zeros(1, 1 if look.color == "L" else 3, height, width, dtype=torch.uint8)
        runs.append(("image", 0, image, (f"{height} x {width} pixels", "image_size, mean or std")))
    if "text" in card.towers:
        tokens, _ = teacher.tokenize([""])
        runs += [
            ("text", length, tokens[:, :length], (f"{length} tokens", "context_length"))
            for length in {teacher.text_lengths[0], card.context_length}
        ]
    flops: dict[tuple[Tower, int], float] = {}
    for tower, length, inputs, (size, names) in runs:
        encode = teacher.encode_images if tower == "image" else teacher.encode_texts
        try:
            features, flops[tower, length] = counted_flops(encode, inputs.to(teacher.device))
        except torch.OutOfMemoryError as error:  # a RuntimeError too, and no fault of the configuration
            raise out_of_memory(card.slug, teacher.device, tower) from error
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise TeacherError(
                f"teacher {card.slug!r}: its {tower} tower does not take {size} ({cause(error, 160)}); "
                f"correct {names} in its configuration or card"
            ) from error
        if features.shape != (1, card.dim):
            raise TeacherError(
                f"teacher {card.slug!r}: its {tower} tower gives features of shape {tuple(features.shape[1:])}, its "
                f"configuration says {card.dim}; correct the configuration, or name a pooling in a YAML card"
            )
    return flops


def counted_flops(encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return what `encode` gives, and the floating-point operations of its products, convolutions and attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter knows neither it nor a CPU's attention
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            return encode(inputs), float(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def find_loader(spec: TeacherSpec) -> TeacherLoader:
    """Return the loader of `spec`. Raises TeacherError if there is no such loader, a broken entry point, or files that
    no loader of ours recognizes."""
    scheme = spec.source.partition(":")[0]
    if spec.loader == AUTO and f"{scheme}:" in (LOCAL_DIR, HF_HUB):
        return _recognizing_loader(spec)
    name = scheme if spec.loader == AUTO else spec.loader
    if name in LOADERS:
        return _built_in(name)
    plugins = {entry.name: entry for entry in entry_points(group="mmkd.teachers")}
    if name not in plugins:
        names = [*LOADERS, *sorted(plugins)]
        hint = did_you_mean(name, names, f"there are {', '.join(names)}")
        raise spec.error(f"there is no loader {name!r}; {hint}")
    where = f"entry point {name!r} ({plugins[name].value})"
    with faults_as(TeacherError, (ImportError, AttributeError), f"{where} cannot be loaded", "; reinstall its package"):
        loader: TeacherLoader = plugins[name].load()
    if lacking := [method for method in ("describe", "load") if not callable(getattr(loader, method, None))]:
        raise TeacherError(f"{where} has no method {' and no '.join(lacking)}; see docs/teachers.md")
    return loader


def _built_in(name: str) -> FileLoader:
    return import_module(LOADERS[name]).LOADER


def _recognizing_loader(spec: TeacherSpec) -> FileLoader:
    source, loaders = source_of(spec), [_built_in(name) for name in LOADERS]
    path = source.find("config.json")
    config = read_json(path) if path is not None else {}
    for loader in loaders:
        if loader.recognizes(spec, source, config):
            return loader
    what = f"a config.json of type {config.get('model_type')!r}" if path else "no open_clip_config.json, no config.json"
    raise spec.error(
        f"{spec.source} has {what}{source.listing()}; expected {' or '.join(one.reads for one in loaders if one.reads)}"
        "; for a bare checkpoint write a YAML card with loader and options.architecture"
    )
