"""Everything that `mmkd store info` shows, as one value. Of runs over the store, durations, and whether one goes on."""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmkd.base.files import list_folder, temporary_files
from mmkd.base.places.remote import StorePath
from mmkd.store.card import TeacherCard
from mmkd.store.hierarchy import read_json
from mmkd.store.inspect.coverage import Coverage, coverage
from mmkd.store.ledger import FOLDED_FOLDER
from mmkd.store.reader import FeatureStore, StoreSummary
from mmkd.store.record import StoreRecord
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
    logs, newest = run_seconds(root), None
    listed = [*list_folder(root / "runs", "*.jsonl"), *list_folder(root / "ledger", "*.json")]
    listed += list_folder(root / FOLDED_FOLDER, "*.jsonl")
    for path in (*listed, *temporary_files(root)):
        if isinstance(path, Path):
            with suppress(FileNotFoundError):  # a temporary file that was renamed in between
                newest = max(newest or 0.0, path.stat().st_mtime)
    age = None if newest is None else max(0.0, time.time() - newest)
    return Activity(
        runs=logs.runs,
        seconds={name: round(total, 3) for name, total in sorted(logs.seconds.items())},
        tflops={
            name: flops / logs.seconds[name] / 1e12 for name, flops in sorted(logs.flops.items()) if logs.seconds[name]
        },
        last_write=None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
        seconds_ago=None if age is None else round(age, 1),
        running=age is not None and age < FRESH_SECONDS and not complete,
        unreadable_lines=logs.unreadable_lines,
    )


@dataclass(frozen=True)
class SelectionSummary:
    """One selection: pairs of rows and teachers (`shape`) kept of those available, and the array's attributes."""

    name: str
    shape: tuple[int, ...]
    kept: int
    available: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class StoreInfo:
    """A store at a glance. No feature is read for it."""

    summary: StoreSummary
    coverage: Coverage
    activity: Activity
    selections: tuple[SelectionSummary, ...]
    cards: dict[str, TeacherCard]
    record: StoreRecord

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values; the summary's fields come first."""
        return asdict(self.summary) | {
            "complete": self.summary.complete,
            "coverage": self.coverage.as_json(),
            "activity": asdict(self.activity),
            "selections": [asdict(selection) for selection in self.selections],
            "cards": {slug: card.model_dump(mode="json") for slug, card in self.cards.items()},
            "versions": self.record.versions,
            "corpus_kind": self.record.corpus.kind,
            "corpus_digest": self.record.corpus.digest,
        }


def store_info(store: FeatureStore) -> StoreInfo:
    """Read ledger, cards, two sample columns, logs and selections. Raises CorruptStoreError if one is unreadable."""
    summary = store.summary()
    return StoreInfo(
        summary=summary,
        coverage=coverage(store),
        activity=activity(store.root, summary.complete),
        selections=tuple(_selections(store.root)),
        cards=dict(store.teachers),
        record=store.record,
    )


def _selections(root: StorePath) -> list[SelectionSummary]:
    """List `selections/` in order of names, by metadata alone."""
    found = []
    for path in (folder / "zarr.json" for folder in list_folder(root / "selections")):
        document = read_json(path) if path.is_file() else {}
        if document.get("node_type") == "array":
            content = (document.get("attributes") or {}).get("mmkd", {})
            pairs = content.get("counts", {}).get("pairs", {})
            shape = tuple(document.get("shape", ()))
            kept, available = pairs.get("kept", 0), pairs.get("available", 0)
            found.append(SelectionSummary(path.parent.name, shape, kept, available, dict(content)))
    return found
