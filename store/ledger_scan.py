"""All that a ledger holds, damaged or not, for verifying and repairing it: readers refuse what is taken apart here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import remove_file
from mmkd.base.places.remote import StorePath, name_in
from mmkd.store.hierarchy import list_part, parse_document
from mmkd.store.layout import folded_entries, ledger_entry
from mmkd.store.ledger import FOLDED_FOLDER, LedgerEntry, folded_lines, read_entry, write_folded

Place = tuple[int, str]
"""Shard and teacher of an entry."""


@dataclass
class LedgerScan:
    """loose, folded: entries by file. faults: file and what is wrong with it. disputed: places with two different
    entries."""

    loose: dict[str, LedgerEntry] = field(default_factory=dict)
    folded: dict[str, list[LedgerEntry]] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    disputed: list[Place] = field(default_factory=list)

    @property
    def files(self) -> set[str]:
        return {*self.loose, *self.folded, *(file for file, _ in self.faults)}

    @property
    def unsure(self) -> set[Place]:
        """Places whose entry lies in a file that was cut or changed."""
        damaged = {file for file, _ in self.faults} & self.folded.keys()
        return {entry.place for file in damaged for entry in self.folded[file]}

    def entries(self) -> list[LedgerEntry]:
        """Return one entry for each place, the loose one where there are two, in order of shards."""
        every = (*(entry for some in self.folded.values() for entry in some), *self.loose.values())
        found = {entry.place: entry for entry in every}
        return [found[place] for place in sorted(found)]


def scan_ledger(root: StorePath) -> LedgerScan:
    """Read every entry that can be read. Raises as `list_part`."""
    scan = LedgerScan()
    for path in list_part(root, "ledger", "*.json"):
        try:
            scan.loose[name_in(root, path)] = read_entry(path)
        except CorruptStoreError as error:
            scan.faults.append((name_in(root, path), str(error)))
    known = {entry.place: entry for entry in scan.loose.values()}
    for path in list_part(root, FOLDED_FOLDER, "*.jsonl"):
        file = name_in(root, path)
        try:
            lines, whole = folded_lines(path)
        except CorruptStoreError as error:
            scan.faults.append((file, str(error)))
            continue
        scan.folded[file] = []
        if not whole:
            scan.faults.append((file, "was cut or changed after it was written"))
        for line in lines:
            try:
                entry = parse_document(LedgerEntry, line, path)
            except CorruptStoreError as error:
                scan.faults.append((file, str(error)))
                continue
            if folded_entries(entry.shard) != file:
                scan.faults.append((file, f"holds an entry of shard {entry.shard}, which belongs elsewhere"))
                continue
            if known.setdefault(entry.place, entry) != entry:
                scan.disputed.append(entry.place)
            scan.folded[file].append(entry)
    return scan


def drop_entries(root: StorePath, doomed: Collection[Place]) -> list[str]:
    """Delete the entries of these places, loose or folded, and those that cannot be read; return a line for each.
    Raises StoreError if the ledger cannot be written."""
    scan, done = scan_ledger(root), []
    damaged = {file for file, _ in scan.faults}
    for file, entries in scan.folded.items():
        kept = [entry for entry in entries if entry.place not in doomed]
        if len(kept) < len(entries) or file in damaged:
            write_folded(root / file, kept)
            done += [f"dropped {ledger_entry(*entry.place)} from {file}" for entry in entries if entry not in kept]
            done += [f"wrote {file} again"] if file in damaged else []
    loose = (file for file, entry in scan.loose.items() if entry.place in doomed)
    for file in sorted({*(damaged - scan.folded.keys()), *loose}):
        remove_file(root / file)
        done.append(f"dropped {file}")
    return done
