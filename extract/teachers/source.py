"""Finding a teacher's files: in a folder, in the hub's cache, or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.spec import HF_HUB, LOCAL_DIR, TeacherSpec

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
VOCABULARY_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip


class Source:
    """One place that holds files by name: `local-dir:/path` or `hf-hub:org/name`. `slug`: the teacher it belongs to,
    for messages. `place`: the source as a user types it. `revision`: commit of a hub repository, empty for the main
    branch."""

    def __init__(self, slug: str, place: str, revision: str = "") -> None:
        self.slug, self.place, self.revision = slug, place, revision
        if place.startswith(LOCAL_DIR):
            self._folder: Path | None = Path(place.removeprefix(LOCAL_DIR)).expanduser()
            if not self._folder.is_dir():
                raise TeacherError(
                    f"teacher {slug!r}: there is no folder {self._folder}; check the path after '{LOCAL_DIR}'"
                )
        elif place.startswith(HF_HUB):
            self._folder = None
        elif place.startswith("https://"):
            raise TeacherError(
                f"teacher {slug!r} is published at {place}, which mmkd does not download from: "
                f"fetch and unpack it, then give {slug}=local-dir:/folder"
            )
        else:
            raise TeacherError(
                f"teacher {slug!r}: cannot read files from {place!r}; write local-dir:/path or hf-hub:org/name"
            )

    @property
    def is_folder(self) -> bool:
        """True for a local folder."""
        return self._folder is not None

    @property
    def name(self) -> str:
        """Last part of the repository's or folder's name."""
        return self.place.rstrip("/").rpartition("/")[2]

    def find(self, filename: str) -> Path | None:
        """Return the file on this machine, fetched from the hub when it is there; None when the place does not have it.
        Raises TeacherError if the hub cannot be asked (offline, gated, no such repository)."""
        if self._folder is not None:
            path = self._folder / filename
            return path if path.is_file() else None
        from mmkd.extract.teachers.hub import fetch_file  # noqa: PLC0415 (the hub client takes a second to import)

        return fetch_file(self.slug, self.place.removeprefix(HF_HUB), filename, self.revision)

    def find_first(self, filenames: tuple[str, ...]) -> Path | None:
        """Return the first of `filenames` that exists."""
        for filename in filenames:
            path = self.find(filename)
            if path is not None:
                return path
        return None

    def need(self, filename: str) -> Path:
        """Return the file, or raise an error that lists the files present."""
        path = self.find(filename)
        if path is None:
            raise TeacherError(f"teacher {self.slug!r}: {self.place} has no {filename}{self.listing()}")
        return path

    def listing(self) -> str:
        """Return a folder's contents for the end of an error message."""
        if self._folder is None:
            return ""
        names = sorted(path.name for path in self._folder.iterdir())
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f" (it holds {shown})" if names else " (it is empty)"

    def inside(self, name: str) -> Source | None:
        """Return the subfolder `name` of a folder as a source of its own, if there is one."""
        if self._folder is None or not (self._folder / name).is_dir():
            return None
        return Source(self.slug, f"{LOCAL_DIR}{self._folder / name}")

    def tokenizer_folder(self) -> Path | None:
        """Return the folder on this machine with the tokenizer's files, or None when this place has none."""
        vocabulary = self.find_first(VOCABULARY_FILES)
        if vocabulary is None:
            return None
        for filename in TOKENIZER_FILES:
            # A hub snapshot holds only what was asked for: ask for each, so that the tokenizer is whole.
            self.find(filename)
        return vocabulary.parent


def source_of(spec: TeacherSpec) -> Source:
    """Return the path of the weights."""
    return Source(spec.slug, spec.source, spec.revision)


def text_sources(spec: TeacherSpec, named: str = "") -> list[Source]:
    """Return places to look for the text tower's configuration and tokenizer, nearest first. The teacher's own folder,
    a subfolder of it called like the text tower's repository, then that repository. `spec`: the teacher. `named`: hub
    id from the teacher's own configuration; `spec.text_source` goes before it."""
    own = source_of(spec)
    place = spec.text_source or (
        named if named.startswith((LOCAL_DIR, HF_HUB)) else f"{HF_HUB}{named}" if named else ""
    )
    if not place:
        return [own]
    nested = own.inside(place.rstrip("/").rpartition("/")[2])
    if spec.text_source.startswith(LOCAL_DIR):
        # Said by the user, so it goes before what happens to lie beside the weights.
        return [Source(spec.slug, place), own]
    return [own, *([nested] if nested else []), Source(spec.slug, place)]


def tokenizer_folder(spec: TeacherSpec, named: str = "") -> Path:
    """Return the nearest folder with a tokenizer for this teacher. Raises TeacherError if there is none beside the
    weights nor where the text tower comes from."""
    sources = text_sources(spec, named)
    for source in sources:
        folder = source.tokenizer_folder()
        if folder is not None:
            return folder
    raise TeacherError(
        f"teacher {spec.slug!r}: no tokenizer in {' or '.join(source.place for source in sources)}; "
        f"put {', '.join(VOCABULARY_FILES[:3])} or the like there, or name its folder with text_source"
    )


def weight_files(spec: TeacherSpec, names: tuple[str, ...], all_of_them: bool = False) -> dict[str, Path]:
    """The files with the weights, under the names they were published as. Raises TeacherError if it is missing; a model
    with random weights is never a teacher. `spec`: the teacher; its own `weights` go before `names`. `names`: what the
    loader looks for: the first that is there (whole or in shards), or all of them. `all_of_them`: see `names`."""
    source = source_of(spec)
    if spec.weights or all_of_them:
        return {name: _original_or_converted(source, name) or source.need(name) for name in spec.weights or names}
    for name in names:
        path = _original_or_converted(source, name)
        if path is not None:
            return {name: path}
        index = source.find(f"{name}.index.json")
        if index is not None:
            shards = cast(dict[str, str], read_json(index).get("weight_map") or {})
            return {shard: source.need(shard) for shard in sorted(set(shards.values()))}
    raise TeacherError(
        f"teacher {spec.slug!r}: {spec.source} has no weights under {', '.join(names)}{source.listing()}; "
        "name the file with 'weights' in a YAML card"
    )


def _original_or_converted(source: Source, name: str) -> Path | None:
    """Return the file, or in a folder what `mmkd teachers convert` made of it."""
    path = source.find(name)
    if path is None and source.is_folder:
        return source.find(converted_name(name))
    return path


def converted_name(name: str) -> str:
    """Return the name that `mmkd teachers convert` gives the safetensors file of `name`."""
    return f"{name.rpartition('.')[0]}.safetensors"


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object. Raises TeacherError if it is half-downloaded or not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} is not a whole JSON file ({error}); download it again") from error
    if not isinstance(content, dict):
        raise TeacherError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content
