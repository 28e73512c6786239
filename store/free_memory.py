"""How much memory this process may still fill with pages of files: what a map's read-ahead is chosen by."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes: what the machine has to spare (page cache counts as spare), or what the job's limit is, if that is less.

    0 where the system does not tell.
    """
    return min(_spare(Path("/proc/meminfo")), *_limits(Path("/proc/self/cgroup"), _CGROUPS))


def _spare(meminfo: Path) -> int:
    """MemAvailable of proc(5); elsewhere all memory that there is."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _limits(own: Path, cgroups: Path) -> list[int]:
    """Memory limits of the control groups (cgroups(7), both versions) that a scheduler put this process into."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    limits = [1 << 63]
    for number, controllers, path in lines:
        if number == "0":
            files = [folder / "memory.max" for folder in _upwards(cgroups, path)]
        elif "memory" in controllers.split(","):
            files = [folder / "memory.limit_in_bytes" for folder in _upwards(cgroups / "memory", path)]
        else:
            continue
        for file in files:
            try:
                text = file.read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return limits


def _upwards(top: Path, path: str) -> list[Path]:
    """A group's folder and those above it: every one of them limits."""
    folder = top / path.lstrip("/")
    return [folder, *(above for above in folder.parents if above.is_relative_to(top))]
