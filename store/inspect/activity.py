"""Runs over a store, from their logs: durations, and whether one is running."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mmkd.base.files import list_folder, temporary_files
from mmkd.base.places.remote import StorePath
from mmkd.store.run_log import run_seconds

FRESH_SECONDS = 300.0
"""A store that was written to within this time may still be written: shards usually take less than five minutes."""


@dataclass(frozen=True)
class Activity:
    """Activity by the logs and newest files. The ledger is authoritative, not the logs."""

    runs: int
    """Logs in `runs/`."""
    seconds: dict[str, float]
    """Summed over runs, workers and threads: `read`, `decode`, `write`, and `image SLUG`, `text SLUG` for forwards."""
    last_write: str | None
    """When the store was last written to: UTC, ISO 8601; None for a store without shards."""
    seconds_ago: float | None
    running: bool
    """Written to within `FRESH_SECONDS`, and not complete: a run is probably going on."""
    unreadable_lines: int
    """Malformed log lines, such as the last one of a run that was killed."""

    def by_teacher(self) -> dict[str, dict[str, float]]:
        """Return forward seconds by teacher, as {slug: {"image": s, "text": s}}; shared phases are not in it."""
        table: dict[str, dict[str, float]] = {}
        for name, seconds in self.seconds.items():
            tower, _, slug = name.partition(" ")
            if slug:
                table.setdefault(slug, {})[tower] = seconds
        return table


def activity(root: StorePath, complete: bool) -> Activity:
    """Read the logs in `runs/` and the times of ledger entries and temporary files. `root`: the store; behind a URL the
    times of files are not known, and it counts as not running. `complete`: every shard of every teacher is recorded;
    then nothing is running, however fresh it is."""
    logs = run_seconds(root)
    listed = (*list_folder(root / "runs", "*.jsonl"), *list_folder(root / "ledger", "*.json"))
    touched = (*listed, *temporary_files(root))
    newest = max(_times(path for path in touched if isinstance(path, Path)), default=None)
    age = None if newest is None else max(0.0, time.time() - newest)
    return Activity(
        runs=logs.runs,
        seconds={name: round(seconds, 3) for name, seconds in sorted(logs.seconds.items())},
        last_write=None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
        seconds_ago=None if age is None else round(age, 1),
        running=age is not None and age < FRESH_SECONDS and not complete,
        unreadable_lines=logs.unreadable_lines,
    )


def _times(paths: Iterable[Path]) -> Iterator[float]:
    for path in paths:
        try:
            yield path.stat().st_mtime
        except FileNotFoundError:  # a temporary file that was renamed in between
            continue
