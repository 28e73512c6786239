"""Runs over a store, from their logs: durations, and whether one is running."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mmkd.base.files import list_folder, temporary_files
from mmkd.base.places.remote import StorePath
from mmkd.store.ledger import FOLDED_FOLDER
from mmkd.store.run_log import run_seconds

FRESH_SECONDS = 300.0
"""A store that was written to within this time may still be written: shards usually take less than five minutes."""


@dataclass(frozen=True)
class Activity:
    """Activity by the logs and newest files. The ledger is authoritative, not the logs."""

    runs: int
    seconds: dict[str, float]
    """Summed over runs, workers and threads; see `mmkd.store.run_log`."""
    tflops: dict[str, float]
    """TFLOP/s of forward passes by `image SLUG` and `text SLUG`, where the logs have both operations and seconds."""
    last_write: str | None
    """When the store was last written to: UTC, ISO 8601; None for a store without shards."""
    seconds_ago: float | None
    running: bool
    """Written to within `FRESH_SECONDS`, and not complete: a run is probably in progress."""
    unreadable_lines: int

    def by_teacher(self) -> dict[str, dict[str, float]]:
        """Return forward seconds by teacher, as {slug: {"image": s, "text": s}}, without the shared phases."""
        table: dict[str, dict[str, float]] = {}
        for name, seconds in self.seconds.items():
            tower, _, slug = name.partition(" ")
            if slug:
                table.setdefault(slug, {})[tower] = seconds
        return table


def activity(root: StorePath, complete: bool) -> Activity:
    """Read the logs in `runs/` and the times of ledger entries and temporary files. A store behind a URL, whose files
    have no times, or that is `complete` counts as not running."""
    logs = run_seconds(root)
    newest = None
    listed = [*list_folder(root / "runs", "*.jsonl"), *list_folder(root / "ledger", "*.json")]
    listed += list_folder(root / FOLDED_FOLDER, "*.jsonl")
    for path in (*listed, *temporary_files(root)):
        if isinstance(path, Path):
            with suppress(FileNotFoundError):  # a temporary file that was renamed in between
                newest = max(newest or 0.0, path.stat().st_mtime)
    age = None if newest is None else max(0.0, time.time() - newest)
    return Activity(
        runs=logs.runs,
        seconds={name: round(seconds, 3) for name, seconds in sorted(logs.seconds.items())},
        tflops={
            name: flops / logs.seconds[name] / 1e12 for name, flops in sorted(logs.flops.items()) if logs.seconds[name]
        },
        last_write=None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
        seconds_ago=None if age is None else round(age, 1),
        running=age is not None and age < FRESH_SECONDS and not complete,
        unreadable_lines=logs.unreadable_lines,
    )
