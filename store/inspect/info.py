"""Everything that `mmkd store info` shows, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mmkd.base.files import list_folder
from mmkd.base.places.remote import StorePath
from mmkd.store.card import TeacherCard
from mmkd.store.hierarchy import read_json
from mmkd.store.inspect.activity import Activity, activity
from mmkd.store.inspect.coverage import Coverage, coverage
from mmkd.store.reader import FeatureStore, StoreSummary
from mmkd.store.record import StoreRecord


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
