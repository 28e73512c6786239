"""Teachers by name: `--teachers` as specs, and the published teachers, a YAML card each in `cards/`. Eight of the nine
are in the original's meta.jsonl; the ninth is inferred."""

import functools
from collections import Counter
from pathlib import Path

from mmkd.base.config import read_mapping, validated
from mmkd.base.errors import TeacherError, did_you_mean
from mmkd.extract.teachers.spec import HF_HUB, LOCAL_DIR, TeacherSpec

FOLDER = Path(__file__).with_name("cards")
_NINE = ("bmca", "biomedclip", "unimedclip", "pmcclip", "quiltnet", "genmedclip", "plip", "pubmedclip", "medclip")
_OWN = ("also_called", "revision", "weights_sha256", "open_questions", "inferred", "sources")
"""Fields that a card does not take from the one that its `like` names."""


class PublishedTeacher(TeacherSpec):
    """Public facts about one model, and the recipe that loads it: `slug` is the card's file name, `weights_sha256` as
    published, `preprocessing` where the authors do otherwise than their files say, or the files do not say."""

    name: str
    like: str = ""
    """The card whose fields this one takes where it has none of its own."""
    also_called: tuple[str, ...] = ()
    """Spellings elsewhere, those of the original's `available_clips` first."""
    gated: bool = False
    """True if the hub gives the files only to those who accepted the terms, or were let in."""
    loader: str
    image_tower: str = "none"
    text_tower: str = "none"
    """What it is; `none`, as the other, where there is none."""
    dim: int
    files: tuple[str, ...]
    """Configuration, weights and tokenizer that the source publishes."""
    tokenizer: str = "CLIP BPE, 49,408 entries"
    context: int = 77
    """Tokens that the authors cut captions to; `context_length` overrides the files."""
    pixels: str = "RGB, 224 px, shorter side bicubic, center crop, OpenAI mean and std"
    """Preprocessing as published; the loader takes it from the files, and its digest covers it."""
    license: str
    """`not stated` if neither the repository nor the model card states one."""
    paper: str
    open_questions: tuple[str, ...] = ()
    """What no public source that we read confirms."""
    sources: tuple[str, ...] = ()
    """Public sources of the facts; those of the nine and their variants are in the documentation."""
    inferred: bool = False
    """True if the model of the original is a guess."""

    @property
    def spec(self) -> TeacherSpec:
        """The recipe, as a user's YAML card would write it."""
        return TeacherSpec(**self.model_dump(include=set(TeacherSpec.model_fields)))


@functools.cache
def _read_cards() -> dict[str, PublishedTeacher]:
    """Return all cards by slug: the nine, then others beside the one they are like."""
    contents = {path.stem: read_mapping(path) for path in sorted(FOLDER.glob("*.yaml"))}
    rank = {slug: number for number, slug in enumerate(_NINE)}
    cards = {}
    order = sorted(contents, key=lambda slug: [rank.get(name, 9) for name in (slug, str(contents[slug].get("like")))])
    for slug in order:
        own = dict(contents[slug])
        original = {name: value for name, value in contents.get(own.get("like", ""), {}).items() if name not in _OWN}
        cards[slug] = validated(PublishedTeacher, {"slug": slug} | original | own, FOLDER / f"{slug}.yaml")
    return cards


def the_nine() -> tuple[PublishedTeacher, ...]:
    return tuple(_read_cards()[slug] for slug in _NINE)


def variants() -> tuple[PublishedTeacher, ...]:
    """Other published forms of the nine: the same loaders, other files or switches."""
    return tuple(card for card in _read_cards().values() if card.like in _NINE)


def encoders() -> tuple[PublishedTeacher, ...]:
    """Other public encoders: image towers alone, and two with both towers."""
    return tuple(card for slug, card in _read_cards().items() if slug not in _NINE and card.like not in _NINE)


def known_teacher(name: str) -> PublishedTeacher | None:
    """Return the published teacher of this slug or another known spelling, in any case; None if there is none."""
    return _names().get(name.lower())


def find_published(name: str) -> PublishedTeacher:
    """Return the teacher as `known_teacher`. Raises TeacherError with the nearest name if there is none."""
    if (teacher := known_teacher(name)) is None:
        hint = did_you_mean(name.lower(), _names(), "see `mmkd teachers list`;")
        raise TeacherError(f"no teacher is called {name!r}: {hint} For one of your own write {name}=local-dir:/path")
    return teacher


def _names() -> dict[str, PublishedTeacher]:
    return {
        called.lower(): teacher
        for teacher in _read_cards().values()
        for called in (teacher.slug, teacher.name, *teacher.also_called)
    }


def parse_teachers(text: str) -> list[TeacherSpec]:
    """Read the value of `--teachers`: `all` for the nine, or a comma-separated list of names in any known spelling,
    `NAME=local-dir:/path` or `NAME=hf-hub:org/name` (a known name keeps its recipe), `card.yaml`, `NAME=card.yaml`,
    `NAME=ENTRYPOINT:...`. Raises TeacherError for an unknown name or place, or two of one name; ConfigError for a
    YAML card that does not fit."""
    if not (entries := [entry.strip() for entry in text.split(",") if entry.strip()]):
        raise TeacherError("no teacher named: give 'all', names from `mmkd teachers list`, or NAME=local-dir:/path")
    specs = [spec for entry in entries for spec in _parse_entry(entry)]
    ((slug, count),) = Counter(spec.slug for spec in specs).most_common(1)
    if count > 1:
        raise TeacherError(f"teacher {slug!r} is named {count} times in {text!r}: each name once")
    return specs


def parse_teacher(text: str) -> TeacherSpec:
    """Read one teacher, as `parse_teachers`. Raises TeacherError if several are named."""
    specs = parse_teachers(text)
    if len(specs) != 1:
        raise TeacherError(f"one teacher at a time: {text!r} names {len(specs)}")
    return specs[0]


def _parse_entry(entry: str) -> list[TeacherSpec]:
    if entry == "all":
        return [teacher.spec for teacher in the_nine()]
    slug, equals, place = (part.strip() for part in entry.partition("="))
    if (place or slug).endswith((".yaml", ".yml")):
        return [read_card(Path(place or slug), slug if equals else None)]
    if not equals:
        if entry.startswith((LOCAL_DIR, HF_HUB)):
            raise TeacherError(f"{entry!r} needs a name to be stored under: write my-teacher={entry}")
        if "/" in entry or Path(entry).is_dir():
            raise TeacherError(f"{entry!r} is a path, not a teacher's name: write my-teacher={LOCAL_DIR}{entry}")
        return [find_published(entry).spec]
    scheme, colon, rest = place.partition(":")
    if not colon or not rest:
        path = place if "/" in place else "/path"
        raise TeacherError(
            f"{entry!r} does not say where the teacher lies: write {slug}=local-dir:{path}, {slug}=hf-hub:org/name "
            f"or {slug}=card.yaml"
        )
    if (published := known_teacher(slug)) is not None and f"{scheme}:" in (LOCAL_DIR, HF_HUB):
        return [published.spec.model_copy(update={"source": place, "revision": ""})]
    return [validated(TeacherSpec, {"slug": slug, "source": place}, entry)]


def read_card(path: Path, slug: str | None = None) -> TeacherSpec:
    """Read a YAML card: the fields of `TeacherSpec`, and optionally `like: NAME` to start from a known teacher. Raises
    ConfigError if the file is no mapping of right fields; TeacherError if `like` names no known teacher."""
    content = read_mapping(path)
    like = content.pop("like", None)
    fields = find_published(str(like)).spec.model_dump(exclude={"slug"}) if like is not None else {}
    spec = validated(TeacherSpec, fields | content | ({"slug": slug} if slug else {}), path)
    if spec.folder is not None and not spec.folder.is_absolute():
        # A relative folder in a card means beside the card, wherever the command is run.
        spec = spec.model_copy(update={"source": f"{LOCAL_DIR}{(path.parent / spec.folder).resolve()}"})
    return spec
