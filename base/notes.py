"""Small facts that are found once and kept between runs: hashes of large files, the speed of a device. They lie in
`$XDG_CACHE_HOME/mmkd`, by default below `~/.cache`; one that is lost is found again."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmkd.base.errors import StoreError
from mmkd.base.files import write_atomically


def read_note(kind: str, about: Sequence[object]) -> Any:
    """Return what is known about something, a JSON value that was noted under `kind`; None where nothing is."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(_path(kind, about).read_text(encoding="utf-8"))
        return content["found"] if content["about"] == list(about) else None
    return None


def write_note(kind: str, about: Sequence[object], found: object) -> None:
    """Note it; a read-only home costs time at the next start, nothing else."""
    with suppress(StoreError):
        write_atomically(_path(kind, about), json.dumps({"about": list(about), "found": found}).encode())


def _path(kind: str, about: Sequence[object]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmkd" / kind
    return folder / f"{hashlib.sha256(json.dumps(list(about)).encode()).hexdigest()}.json"
