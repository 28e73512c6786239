"""Model hub reachability and locally available teacher weights."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mmkd.base.text import bytes_text
from mmkd.cli.doctor.machine import Check
from mmkd.extract.teachers.published import PublishedTeacher, the_nine

HUB = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}


def hub_check(seconds: float) -> Check:
    """Ask the hub (or the mirror that HF_ENDPOINT names) for one small file, for at most `seconds`. Runs in a thread,
    because a name lookup has no timeout."""
    place = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        return Check("hub", place, "note", "HF_HUB_OFFLINE is set: only what is in the cache is used")
    if not place.startswith(("http://", "https://")):
        return Check("hub", place, "warning", "HF_ENDPOINT is no http(s) address", f"unset it, or write {HUB}")
    answer: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{place}/robots.txt", timeout=seconds) as reply:  # noqa: S310 - http(s), above
                answer.append(f"answers ({reply.status})")
        except urllib.error.HTTPError as error:
            answer.append(f"answers ({error.code})")
        except (OSError, ValueError) as error:
            answer.append(f"! {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    said = answer[0] if answer else f"! no answer within {seconds:g} s"
    if said.startswith("!"):
        step = "set HF_ENDPOINT to a mirror, or give teachers as NAME=local-dir:/path"
        return Check("hub", place, "warning", f"cannot be reached: {said[2:]}", step)
    return Check("hub", place, "ok", said)


def cache_folder() -> Path:
    """Return huggingface_hub's cache folder."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def teacher_checks() -> Iterator[Check]:
    """Yield one line for each of the nine: local files and license. Asks no network."""
    yield from map(_teacher, the_nine())


def _teacher(teacher: PublishedTeacher) -> Check:
    terms = f"licence {teacher.licence}"
    repository = teacher.spec.repository
    if repository is None:
        step = f"fetch and unpack {teacher.source}, then --teachers {teacher.slug}=local-dir:/folder"
        return Check("teachers", teacher.slug, "note", f"not on the hub; {terms}", step)
    held = cached_bytes(repository)
    if held:
        step = f"mmkd teachers check {teacher.slug}"
        return Check("teachers", teacher.slug, "ok", f"{bytes_text(held)} in the cache; {terms}", step)
    kind = "--repo-type dataset " if repository.startswith("datasets/") else ""
    step = f"fetched when it is first used, or: hf download {kind}{repository.removeprefix('datasets/')}"
    return Check("teachers", teacher.slug, "note", f"not in the cache; {terms}", step)


def cached_bytes(repository: str) -> int:
    """Return bytes that the cache holds of a repository (`org/name`, `datasets/org/name`); 0 when it is not there."""
    kind, name = ("datasets", repository.removeprefix("datasets/")) if repository.startswith("datasets/") else (
        "models", repository
    )  # fmt: skip
    folder = cache_folder() / f"{kind}--{name.replace('/', '--')}" / "snapshots"
    # A snapshot's files are links to blobs; one that was cut off has no link yet.
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
