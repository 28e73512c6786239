"""The published teachers: a YAML card each in `cards/`, read on first use. Eight of the nine are in the original's
meta.jsonl; the ninth is inferred. `mmkd teachers check` with real weights and the original's samples (`--golden`)
settles a card's open questions."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Literal, overload

from pydantic import Field, JsonValue

from mmkd.base.config import Frozen, read_mapping, validated
from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.spec import TeacherSpec

FOLDER = Path(__file__).with_name("cards")
_NINE = ("bmca", "biomedclip", "unimedclip", "pmcclip", "quiltnet", "genmedclip", "plip", "pubmedclip", "medclip")
_OWN = ("also_called", "revision", "weights_sha256", "open_questions", "inferred")
"""Fields that a card does not take from the one that its `like` names."""


class PublishedTeacher(Frozen):
    """Public facts about one model, and the recipe that loads it."""

    slug: str
    """The card's file name."""
    name: str
    also_called: tuple[str, ...] = ()
    """Spellings elsewhere, those of the original's `available_clips` first."""
    source: str
    revision: str = ""
    """Commit that others pinned publicly; empty where none is known."""
    loader: str
    weights: tuple[str, ...] = ()
    """Empty where the loader finds the usual names."""
    weights_sha256: str = ""
    """As published; empty where it is not known."""
    text_source: str = ""
    context_length: int | None = None
    options: dict[str, JsonValue] = Field(default_factory=dict)
    image_tower: str
    text_tower: str
    dim: int
    files: tuple[str, ...]
    """Configuration, weights and tokenizer that the source publishes."""
    tokenizer: str = "CLIP BPE, 49,408 entries"
    context: int = 77
    """Tokens that the authors cut captions to; `context_length` above overrides the files."""
    pixels: str = "RGB, 224 px, shorter side bicubic, center crop, OpenAI mean and std"
    """Preprocessing as published; the loader takes it from the files, and its digest covers it."""
    licence: str
    """`not stated` if neither the repository nor the model card states one."""
    paper: str
    open_questions: tuple[str, ...] = ()
    inferred: bool = False
    """True if the model of the original is a guess."""

    @property
    def spec(self) -> TeacherSpec:
        """The recipe, as a user's YAML card would write it."""
        return TeacherSpec(**self.model_dump(include=set(TeacherSpec.model_fields) & set(type(self).model_fields)))


@functools.cache
def _read_cards() -> dict[str, PublishedTeacher]:
    """Return all cards by slug: the nine, then others beside the one they are like."""
    contents = {path.stem: read_mapping(path) for path in sorted(FOLDER.glob("*.yaml"))}
    order = sorted(contents, key=lambda slug: _rank(slug) + _rank(str(contents[slug].get("like"))))
    cards = {}
    for slug in order:
        own = dict(contents[slug])
        original = {name: value for name, value in contents.get(own.pop("like", ""), {}).items() if name not in _OWN}
        cards[slug] = validated(PublishedTeacher, {"slug": slug} | original | own, FOLDER / f"{slug}.yaml")
    return cards


def _rank(slug: str) -> tuple[int]:
    return (_NINE.index(slug) if slug in _NINE else len(_NINE),)


def the_nine() -> tuple[PublishedTeacher, ...]:
    """Return the nine teachers of MMKD-CLIP."""
    return tuple(_read_cards()[slug] for slug in _NINE)


def variants() -> tuple[PublishedTeacher, ...]:
    """Other published forms of the nine: the same loaders, other files or switches."""
    return tuple(card for slug, card in _read_cards().items() if slug not in _NINE)


@overload
def find_published(name: str) -> PublishedTeacher: ...
@overload
def find_published(name: str, *, missing_ok: Literal[True]) -> PublishedTeacher | None: ...
def find_published(name: str, *, missing_ok: bool = False) -> PublishedTeacher | None:
    """Return the published teacher of this slug or of another known spelling, case-insensitively. Raises TeacherError
    if there is none, and `missing_ok` is false; the nearest name is suggested."""
    names = {
        called.lower(): teacher
        for teacher in _read_cards().values()
        for called in (teacher.slug, teacher.name, *teacher.also_called)
    }
    if name.lower() in names:
        return names[name.lower()]
    if missing_ok:
        return None
    near = difflib.get_close_matches(name.lower(), names, 1)
    hint = f"did you mean {near[0]!r}?" if near else "see `mmkd teachers list`;"
    raise TeacherError(f"no teacher is called {name!r}: {hint} For one of your own write {name}=local-dir:/path")
