"""Download of a described data set to where its description expects the files: whole, checked, or not at all."""

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkd.base.config import SUITES, filled, read_mapping, user_roots, validated
from mmkd.base.errors import ConfigError, UserError
from mmkd.base.places.remote import StorePath, as_root
from mmkd.evaluate.dataset_spec import About, Download


def source_place(source: dict[str, Any], dataset: str, description: Path) -> StorePath:
    """Return the file or folder that `source` reads. Raises ConfigError if a root has no value."""
    path = str(filled(source.get("path", ""), user_roots() | {"dataset": dataset}, description))
    return as_root(path if "://" in path else str(description.parent / path))


def fetch_dataset(name: str, say: Callable[[str], object], *, dry_run: bool = False) -> bool:
    """Download what may be downloaded of a set that comes with mmkd, or a description; `say` every step and what
    remains to be done. Returns whether its source is there. Raises ConfigError without a description that has a
    `source`; UserError if a download fails; what came whole before it stays."""
    path = next((file for file in SUITES.glob("*/datasets/*.yaml") if file.stem == name), Path(name))
    content = read_mapping(path)
    if not isinstance(content.get("source"), dict):
        raise ConfigError(f"{path} has no `source`; name one of `mmkd evaluate check biomed`, or a description")
    about = validated(About, content.get("about") or {}, f"{path}: about")
    place = source_place(content["source"], str(content.get("dataset")), path)
    terms = "; ".join(part for part in (f"licence: {about.licence or 'not stated'}", about.access) if part)
    say(f"{content.get('dataset')}: {about.homepage or 'no homepage'} ({terms})")
    if about.layout is not None:
        say(f"layout: {about.layout}{f', see {about.evidence}' if about.evidence else ''}")
    for file in about.fetch.files:
        target = path.parent / Path(filled(file.to, user_roots(), path)).expanduser()
        if dry_run or target.exists():
            say(f"{'here' if target.exists() else 'would download'}: {target} ({file.url})")
        else:
            _download(file, target)
            say(f"downloaded: {target} ({file.url})")
    for step in about.fetch.steps:
        say(f"by hand: {filled(step, user_roots(), path)}")
    say(f"{'here' if place.exists() else 'missing'}: {place}")
    return place.exists()


def _download(file: Download, target: Path) -> None:
    base = next(folder for folder in target.absolute().parents if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".mmkd-fetch-", dir=base) as folder:
            part = Path(folder) / "download"
            _receive(file, part)
            if file.member is not None:
                unpacked = Path(folder) / "unpacked"
                if zipfile.is_zipfile(part):
                    shutil.unpack_archive(part, unpacked, "zip")
                else:
                    shutil.unpack_archive(part, unpacked, "tar", filter="data")
                part = unpacked / file.member
                if not part.exists():
                    raise UserError(f"{file.url} has no {file.member}; nothing was placed")
            target.parent.mkdir(parents=True, exist_ok=True)
            part.rename(target)
    except (zipfile.BadZipFile, tarfile.TarError, shutil.ReadError, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(
            f"{file.url} is no archive that can be unpacked whole: {type(error).__name__}; download it yourself"
        ) from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        inner = getattr(error, "reason", None)
        cause = inner if isinstance(inner, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise UserError(f"{file.url} did not get to {target}: {reason}; try again, or download it yourself") from error


def _receive(file: Download, part: Path) -> None:
    digest = hashlib.new((file.checksum or "sha256").partition(":")[0], usedforsecurity=False)
    with urllib.request.urlopen(file.url, timeout=60) as answer, part.open("wb") as out:  # noqa: S310 - http(s)
        while block := answer.read(1 << 20):
            digest.update(block)
            out.write(block)
        size, announced = out.tell(), answer.headers.get("Content-Length")
    if announced is not None and size != int(announced):
        raise UserError(f"{file.url} ended after {size} of {announced} bytes; try again")
    found = f"{digest.name}:{digest.hexdigest()}"
    if file.checksum is not None and found != file.checksum:
        raise UserError(f"{file.url} has the checksum {found}, expected {file.checksum}; nothing was placed")
