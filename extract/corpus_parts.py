"""The corpus' files and its overview as they were when the store was made: `runs/corpus.json`. A log: without it the
record's digest still notices a change, but nothing names it."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from pydantic import TypeAdapter

from mmkd.base.files import write_atomically
from mmkd.base.places.remote import StorePath
from mmkd.extract.corpora import Part
from mmkd.extract.report import Overview

_FILE = "runs/corpus.json"


def write_parts(root: StorePath, settings: str, parts: Sequence[Part], overview: Overview) -> None:
    """Write the log. Raises StoreError if the store cannot be written."""
    content = {
        "settings": settings,
        "parts": [[part.name, part.size, part.stamp] for part in parts],
        "overview": asdict(overview),
    }
    write_atomically(root / _FILE, json.dumps(content).encode())


def read_overview(root: StorePath) -> Overview | None:
    """Return the overview of the store's first corpus; None where the log is gone."""
    try:
        return TypeAdapter(Overview).validate_python(json.loads((root / _FILE).read_bytes())["overview"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def only_written_again(root: StorePath, settings: str, parts: Sequence[Part]) -> bool:
    """Return True if all parts have the recorded name, place, size and reading settings, and differ at most in change
    time. A different ETag or hash means different bytes."""
    if (noted := _read_log(root)) is None or noted[0] != settings or len(noted[1]) != len(parts):
        return False
    # Change times are nanoseconds in decimal digits; tags and hashes are not (`mmkd.base.places.reading.Listed`).
    return all(
        (name, size) == (part.name, part.size)
        and (stamp == part.stamp or (stamp.isdecimal() and part.stamp.isdecimal()))
        for (name, (size, stamp)), part in zip(noted[1].items(), parts, strict=True)
    )


def what_changed(root: StorePath, settings: str, parts: Sequence[Part]) -> str | None:
    """Return one phrase that names the first difference and counts the others; None where nothing was noted."""
    if (noted := _read_log(root)) is None:
        return None
    settings_before, before = noted
    now = {part.name: (part.size, part.stamp) for part in parts}
    found = [f"{name} is new" for name in now if name not in before]
    found += [f"{name} is gone" for name in before if name not in now]
    for name, (size, stamp) in now.items():
        size_before, stamp_before = before.get(name, (size, stamp))
        if size != size_before:
            found.append(f"{name} has {size:,} bytes, had {size_before:,}")
        elif stamp != stamp_before:
            found.append(f"{name} was written again (same size)")
    if settings != settings_before:
        found.append("the way it is read changed (corpus.yaml, --require)")
    if not found:
        return "the order or the reader changed"
    return found[0] + (f" (and {len(found) - 1:,} further changes)" if len(found) > 1 else "")


def _read_log(root: StorePath) -> tuple[str, dict[str, tuple[int, str]]] | None:
    """Return settings, and size and stamp by name."""
    try:
        content = json.loads((root / _FILE).read_bytes())
        return content["settings"], {name: (size, stamp) for name, size, stamp in content["parts"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
