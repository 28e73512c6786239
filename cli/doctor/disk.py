"""Room where stores and weights are to lie."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmkd.base.text import bytes_text
from mmkd.cli.doctor.check import Check

LITTLE = 10 * 1024**3
"""Bytes: the nine teachers' weights take about 6 GB, features of 100,000 pairs by all nine about 2 GB."""


def disk_checks(folder: Path, cache: Path) -> Iterator[Check]:
    """Free room in the folder for stores, the hub's cache and the folder for temporary files."""
    for name, place in (("stores", folder), ("weights", cache), ("temporary", Path(tempfile.gettempdir()))):
        yield _room(name, place)


def _room(name: str, place: Path) -> Check:
    there = place.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Check(
            "disk", name, "warning", f"{place} cannot be written", "choose another folder, or change its rights"
        )
    if free < LITTLE:
        return Check("disk", name, "warning", f"{bytes_text(free)} free in {place}", "make room, or use another disk")
    return Check("disk", name, "ok", f"{bytes_text(free)} free in {place}")
