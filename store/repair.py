"""Drop what verify found unsound and nothing else; the next extraction redoes exactly that.

Nothing is guessed. An entry that cannot be kept is deleted (its shard then counts as not done), a sample
part that cannot be trusted is deleted (the next extraction lists it again from the corpus), and metadata
that follows from the record and the card is written again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import disk_errors, temporary_files
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath, name_in
from mmkd.store.card import read_card, teacher_folders
from mmkd.store.hierarchy import group_document, write_document
from mmkd.store.layout import ledger_entry, sample_part, teacher_group
from mmkd.store.ledger import entry_paths
from mmkd.store.record import read_record
from mmkd.store.verify import Problem, VerifyReport
from mmkd.store.writer import array_documents

TEMPORARY_SECONDS = 3600
"""A temporary file is removed when it is older: a younger one may be a writer at work."""


def repair(root: StorePath, report: VerifyReport) -> tuple[str, ...]:
    """Repair a store as far as possible without its corpus and teachers. Returns the files that were dropped or written
    again, as lines for the user. Raises StoreError if the store cannot be written; BusyStoreError if another process
    writes to it. `root`: the store that `report` is about. `report`: of `verify`, a moment ago."""
    with only_writer(root, "mmkd store verify --repair"):
        doomed = dict.fromkeys(name for finding in report.findings for name in _files_to_drop(root, finding))
        # Entries first: a kill in between leaves shards without an entry, never entries without a shard.
        ordered = sorted(doomed, key=lambda name: not name.startswith(("ledger/", "inputs/")))
        done = [f"dropped {name}" for name in ordered if _drop(root / name)]
        broken = {finding.file for finding in report.findings if finding.shard is None and finding.file not in doomed}
        for name, document in _derived_documents(root):
            if name in broken:
                write_document(root / name, document)
                done.append(f"wrote {name} again")
        temporary = (path for path in temporary_files(root) if isinstance(path, Path))  # URLs have none
        old = [path for path in temporary if time.time() - path.stat().st_mtime > TEMPORARY_SECONDS]
        return (*done, *(f"dropped {name_in(root, path)}" for path in old if _drop(path)))


def _files_to_drop(root: StorePath, finding: Problem) -> Iterator[str]:
    """Yield files that must go because of one finding."""
    entries = [path.name for path in entry_paths(root)]
    if finding.shard is not None and finding.teacher is not None:
        yield ledger_entry(finding.shard, finding.teacher)
    elif finding.shard is not None:
        yield from (f"ledger/{name}" for name in entries if name.startswith(f"{finding.shard:05d}."))
        yield sample_part(finding.shard)
    elif finding.teacher is not None:
        # The teacher of these features is unknown.
        yield from (f"ledger/{name}" for name in entries if name[name.find(".") + 1 :] == f"{finding.teacher}.json")
        yield f"{teacher_group(finding.teacher)}/zarr.json"
    elif finding.file.startswith(("ledger/", "inputs/")):
        yield finding.file


def _derived_documents(root: StorePath) -> Iterator[tuple[str, dict[str, object]]]:
    record = read_record(root)
    yield "teachers/zarr.json", group_document()
    for slug in teacher_folders(root):
        try:
            card = read_card(root, slug)
        except CorruptStoreError:
            continue
        if card is not None:
            yield from array_documents(record, card)


def _drop(path: StorePath) -> bool:
    there = path.exists()
    with disk_errors(path):
        path.unlink(missing_ok=True)
    return there
