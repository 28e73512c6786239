"""Selections in a store, by their metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkd.base.files import list_folder
from mmkd.base.places.remote import StorePath
from mmkd.store.hierarchy import read_json


@dataclass(frozen=True)
class SelectionSummary:
    """One selection: pairs of rows and teachers chosen by a rule."""

    name: str
    shape: tuple[int, ...]
    """Shape of the array: rows and teachers."""
    kept: int
    """Pairs, of `available` ones when the selection was made."""
    available: int
    attributes: dict[str, Any]
    """Attributes written with it: the rule, counts, digests."""


def selections(root: StorePath) -> list[SelectionSummary]:
    """List `selections/`, in order of names. Reads metadata, no values. Raises CorruptStoreError if the metadata of a
    selection cannot be read."""
    found = []
    for path in (folder / "zarr.json" for folder in list_folder(root / "selections")):
        if not path.is_file():
            continue
        document = read_json(path)
        if document.get("node_type") == "array":
            attributes = document.get("attributes") or {}
            content = attributes.get("mmkd", {})
            pairs = content.get("counts", {}).get("pairs", {})
            found.append(
                SelectionSummary(
                    name=path.parent.name,
                    shape=tuple(document.get("shape", ())),
                    kept=pairs.get("kept", 0),
                    available=pairs.get("available", 0),
                    attributes=dict(content),
                )
            )
    return found
