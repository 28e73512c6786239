"""`--teachers`: names, places and YAML cards as specs."""

from __future__ import annotations

from pathlib import Path

from mmkd.base.config import read_mapping, validated
from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.published import find_published, the_nine
from mmkd.extract.teachers.spec import HF_HUB, LOCAL_DIR, TeacherSpec


def parse_teachers(text: str) -> list[TeacherSpec]:
    """Read the value of `--teachers`. Raises TeacherError for an unknown name (suggesting the nearest), an unreadable
    place, or two teachers of one name. Raises ConfigError for a YAML card that does not fit.

    Args:
        text: `all` for the nine, or a comma-separated list of: a name (`biomedclip`, also a paper's
            spelling such as `PUBMEDCLIP`), `NAME=local-dir:/path` or `NAME=hf-hub:org/name` (a known name
            keeps its recipe and only changes place), `card.yaml`, `NAME=card.yaml`, `NAME=ENTRYPOINT:...`.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise TeacherError("no teacher named: give 'all', names from `mmkd teachers list`, or NAME=local-dir:/path")
    specs = [spec for entry in entries for spec in _parse_entry(entry)]
    slugs = [spec.slug for spec in specs]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise TeacherError(f"teacher {slug!r} is named {slugs.count(slug)} times in {text!r}: each name once")
    return specs


def _parse_entry(entry: str) -> list[TeacherSpec]:
    if entry == "all":
        return [teacher.spec for teacher in the_nine()]
    slug, equals, place = entry.partition("=")
    if not equals:
        if _is_yaml(entry):
            return [read_card(Path(entry))]
        _refuse_bare_place(entry)
        return [find_published(entry).spec]
    slug, place = slug.strip(), place.strip()
    if _is_yaml(place):
        return [read_card(Path(place), slug)]
    scheme, colon, rest = place.partition(":")
    if not colon or not rest:
        path = place if "/" in place else "/path"
        raise TeacherError(
            f"{entry!r} does not say where the teacher lies: write {slug}=local-dir:{path}, {slug}=hf-hub:org/name "
            f"or {slug}=card.yaml"
        )
    published = find_published(slug, missing_ok=True)
    if published is not None and f"{scheme}:" in (LOCAL_DIR, HF_HUB):
        return [published.spec.model_copy(update={"source": place, "revision": ""})]
    return [validated(TeacherSpec, {"slug": slug, "source": place}, entry)]


def read_card(path: Path, slug: str | None = None) -> TeacherSpec:
    """Read a YAML card: the fields of `TeacherSpec`, and optionally `like: NAME` to start from a known teacher. Raises
    ConfigError if the file is missing, is not a YAML mapping, or has a field that is unknown or wrong; TeacherError if
    `like` names no known teacher."""
    content = read_mapping(path)
    like = content.pop("like", None)
    fields = find_published(str(like)).spec.model_dump(exclude={"slug"}) if like is not None else {}
    fields |= content
    fields |= {"slug": slug} if slug else {}
    spec = validated(TeacherSpec, fields, path)
    if spec.folder is not None and not spec.folder.is_absolute():
        # A relative folder in a card means beside the card, wherever the command is run.
        spec = spec.model_copy(update={"source": f"{LOCAL_DIR}{(path.parent / spec.folder).resolve()}"})
    return spec


def _is_yaml(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _refuse_bare_place(entry: str) -> None:
    """Explain how to write a place without a name. Raises TeacherError if `entry` is a folder or a `scheme:` without a
    name."""
    if entry.startswith((LOCAL_DIR, HF_HUB)):
        raise TeacherError(f"{entry!r} needs a name to be stored under: write my-teacher={entry}")
    if "/" in entry or Path(entry).is_dir():
        raise TeacherError(f"{entry!r} is a path, not a teacher's name: write my-teacher={LOCAL_DIR}{entry}")
