"""Files of a teacher and their hashes: in a folder, in the hub's cache, on the hub or its mirror (`HF_ENDPOINT`)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

from mmkd.base.errors import TeacherError, cause, faults_as
from mmkd.base.notes import read_note, write_note
from mmkd.extract.teachers.spec import HF_HUB, LOCAL_DIR, TeacherSpec

VOCABULARY_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip

_SAVED = ("model.safetensors", "pytorch_model.bin")  # timm's and transformers' names

# A connection that breaks in the middle raises the HTTP library's own error: requests, httpx or httpx2, by version.
_HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]


class Source:
    """One place that holds files of `spec` by name. `place`: `local-dir:/path` or `hf-hub:org/name`. `revision`: commit
    of a hub repository, empty for the main branch."""

    def __init__(self, spec: TeacherSpec, place: str, revision: str = "") -> None:
        self.spec, self.place, self.revision = spec, place, revision
        self.folder = Path(place.removeprefix(LOCAL_DIR)).expanduser() if place.startswith(LOCAL_DIR) else None
        if self.folder is not None:
            if not self.folder.is_dir():
                raise spec.error(f"there is no folder {self.folder}; check the path after '{LOCAL_DIR}'")
        elif place.startswith("https://"):
            raise TeacherError(
                f"teacher {spec.slug!r} is published at {place}, which mmkd does not download from: "
                f"fetch and unpack it, then give {spec.slug}=local-dir:/folder"
            )
        elif not place.startswith(HF_HUB):
            raise spec.error(f"cannot read files from {place!r}; write local-dir:/path or hf-hub:org/name")

    def find(self, filename: str) -> Path | None:
        """Return the file on this machine, fetched from the hub when it is there; None when the place does not have it.
        Raises TeacherError if the hub cannot be asked (offline, gated, no such repository)."""
        if self.folder is None:
            return _fetch(self.spec, self.place.removeprefix(HF_HUB), filename, self.revision)
        path = self.folder / filename
        return path if path.is_file() else None

    def need(self, filename: str) -> Path:
        """Return the file. Raises TeacherError with the files that are present if it is not there."""
        if (path := self.find(filename)) is None:
            raise self.spec.error(f"{self.place} has no {filename}{self.listing()}")
        return path

    def listing(self) -> str:
        """Return a folder's contents for the end of an error message."""
        if self.folder is None:
            return ""
        names = sorted(path.name for path in self.folder.iterdir())
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f" (it holds {shown})" if names else " (it is empty)"

    def tokenizer_folder(self) -> Path | None:
        """Return the folder on this machine with the tokenizer's files, or None when this place has none."""
        vocabulary = next((path for name in VOCABULARY_FILES if (path := self.find(name)) is not None), None)
        # A hub snapshot holds only what was asked for: ask for each, so that the tokenizer is whole.
        for filename in TOKENIZER_FILES if vocabulary else ():
            self.find(filename)
        return vocabulary and vocabulary.parent


def _fetch(spec: TeacherSpec, repository: str, filename: str, revision: str) -> Path | None:
    """Return a hub file's path in the cache, downloading it once; None when the repository exists without it."""
    # Some weights lie in a repository of the hub's other kind: `datasets/org/name`, as in its web address.
    kind = "dataset" if repository.startswith("datasets/") else "model"
    full_name = repository.removeprefix("datasets/")
    try:
        cached = huggingface_hub.try_to_load_from_cache(full_name, filename, revision=revision or None, repo_type=kind)
    except hub_errors.HFValidationError as error:
        raise spec.error(f"{repository!r} is not a repository's name; write hf-hub:org/name") from error
    if cached is not None:
        # Not a path: the cache remembers that the hub said there is no such file.
        return Path(cached) if isinstance(cached, str) else None
    where, offline = f"{repository}/{filename}", is_offline_mode()
    elsewhere = f"or download the repository elsewhere and give {spec.slug}=local-dir:/path"
    try:
        return Path(huggingface_hub.hf_hub_download(full_name, filename, revision=revision or None, repo_type=kind))
    except hub_errors.LocalEntryNotFoundError as error:
        folder = Path(HF_HUB_CACHE, f"{kind}s--{full_name.replace('/', '--')}", "snapshots")
        if offline and any(folder.glob("*")):
            return None  # the repository was downloaded: a missing file was then not wanted
        obstacle = "the hub cannot be reached; connect, set HF_ENDPOINT to a mirror"
        obstacle = "HF_HUB_OFFLINE is set; unset it once to download" if offline else obstacle
        raise spec.error(f"{where} is not in the cache {HF_HUB_CACHE} and {obstacle}, {elsewhere}") from error
    except hub_errors.EntryNotFoundError:
        return None
    except hub_errors.GatedRepoError as error:
        raise spec.error(
            f"{where} is gated: accept its terms at https://huggingface.co/{repository}, "
            f"run `hf auth login`, {elsewhere}"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise spec.error(f"{where}: the repository has no revision {revision!r}; leave it out or correct it") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise spec.error(
            f"{where}: the hub knows no such repository, or it is private; check the name, "
            f"run `hf auth login`, {elsewhere}"
        ) from error
    except (_HTTP_ERROR, OSError) as error:
        raise spec.error(
            f"{where} could not be downloaded ({cause(error)}); try again, set HF_ENDPOINT to a mirror, {elsewhere}"
        ) from error


def source_of(spec: TeacherSpec) -> Source:
    return Source(spec, spec.source, spec.revision)


def text_sources(spec: TeacherSpec, named: str = "") -> list[Source]:
    """Return the places to look for the text tower's configuration and tokenizer, nearest first: the teacher's own
    folder, a subfolder of it called like the text tower's repository, then that repository. `named`: hub id from the
    teacher's own configuration; `spec.text_source` goes before it."""
    own = source_of(spec)
    is_hub_id = named and not named.startswith((LOCAL_DIR, HF_HUB))
    place = spec.text_source or (f"{HF_HUB}{named}" if is_hub_id else named)
    if not place:
        return [own]
    if spec.text_source.startswith(LOCAL_DIR):
        # Said by the user, so it goes before what happens to lie beside the weights.
        return [Source(spec, place), own]
    nested = own.folder / place.rstrip("/").rpartition("/")[2] if own.folder else None
    inside = [Source(spec, f"{LOCAL_DIR}{nested}")] if nested and nested.is_dir() else []
    return [own, *inside, Source(spec, place)]


def tokenizer_folder(spec: TeacherSpec, named: str = "") -> Path:
    """Return the nearest folder with a tokenizer for this teacher. Raises TeacherError if there is none."""
    sources = text_sources(spec, named)
    for source in sources:
        if folder := source.tokenizer_folder():
            return folder
    raise spec.error(
        f"no tokenizer in {' or '.join(source.place for source in sources)}; "
        f"put {', '.join(VOCABULARY_FILES[:3])} or the like there, or name its folder with text_source"
    )


def weight_files(spec: TeacherSpec, names: Sequence[str] = _SAVED, all_of_them: bool = False) -> dict[str, Path]:
    """Return the files with the weights, by the names they were published under. Raises TeacherError if they are
    missing. `names`: the first that is there (whole or in shards), or all; the spec's own `weights` go before."""
    source = source_of(spec)
    if spec.weights or all_of_them:
        return {name: _original_or_converted(source, name) or source.need(name) for name in spec.weights or names}
    for name in names:
        if path := _original_or_converted(source, name):
            return {name: path}
        if index := source.find(f"{name}.index.json"):
            weight_map = read_json(index).get("weight_map")
            shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
            if not shards or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
                raise TeacherError(f"{index} has no weight_map from tensors to files beside it; download it again")
            return {shard: source.need(shard) for shard in sorted(set(shards))}
    raise spec.error(
        f"{spec.source} has no weights under {', '.join(names)}{source.listing()}; "
        "name the file with 'weights' in a YAML card"
    )


def _original_or_converted(source: Source, name: str) -> Path | None:
    """Return the file, or in a folder what `mmkd teachers convert` made of it."""
    path = source.find(name)
    return source.find(converted_name(name)) if path is None and source.folder is not None else path


def converted_name(name: str) -> str:
    """Return the name that `mmkd teachers convert` gives the safetensors file of `name`."""
    return f"{name.rpartition('.')[0]}.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises TeacherError if it is half-downloaded or not JSON."""
    with faults_as(TeacherError, (OSError, ValueError), f"{path} is not a whole JSON file", "; download it again"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise TeacherError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def file_sha256(path: Path, skip: int = 0) -> str:
    """Return the hex SHA-256 of a file's bytes from offset `skip` on. Hashed once: a note remembers it by path, size,
    time and inode. Raises TeacherError if it cannot be read."""
    with faults_as(TeacherError, OSError, f"cannot read {path}"):
        status = path.stat()
        identity = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, skip]
        if known := read_note("sha256", identity):
            return str(known)
        with path.open("rb") as file:
            file.seek(skip)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_note("sha256", identity, digest)
    return digest
