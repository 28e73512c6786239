"""Compare the files of a store with its ledger, and drop what was found unsound. Every problem names one file. `repair`
guesses nothing: an entry that cannot be kept is deleted (its shard counts as not done), a sample part that cannot be
trusted is deleted (the next extraction lists it again), and metadata that follows from the record and the card is
written again."""

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import TEMPORARY_SUFFIX, list_folder, remove_file, temporary_files, walk_files
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath, name_in
from mmkd.store.card import TeacherCard, read_card, teacher_folders
from mmkd.store.folded_parts import folded_end, read_folded_parts
from mmkd.store.hierarchy import document_fault, group_document, list_part, read_json, read_range, write_document
from mmkd.store.inputs import inputs_faults
from mmkd.store.layout import folded_entries, folded_parts, ledger_entry, sample_part, teacher_group
from mmkd.store.ledger_check import EntryCheck, drop_entries, scan_ledger
from mmkd.store.record import Store, read_record
from mmkd.store.samples import read_part, sample_schema, unfold_parts
from mmkd.store.selections import FOLDER as SELECTIONS
from mmkd.store.selections import selection_faults, selection_names
from mmkd.store.writer import array_documents, iter_shards

TEMPORARY_SECONDS = 3600
"""Repair removes a temporary file that is older: a younger one may be a writer at work."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file."""

    file: str
    what: str
    shard: int | None = None
    """Shard whose entries cannot be kept; None when no shard is to blame."""
    teacher: str | None = None
    """Teacher whose entry (or, without a shard, all of whose entries) cannot be kept; None for all teachers."""

    def __str__(self) -> str:
        place = f"shard {self.shard}" if self.shard is not None else ""
        of = f"{' of ' if place else 'teacher '}{self.teacher}" if self.teacher else ""
        return f"{place}{of}: {self.what}" if place or of else self.what


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify`: entries checked, faults, left-overs of interrupted writes (harmless), files without an entry
    (which readers ignore), whether values were checked too, and of how many shards."""

    entries: int
    findings: tuple[Problem, ...]
    temporary: tuple[str, ...]
    orphans: tuple[str, ...]
    deep: bool
    shards: int
    all_shards: int

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(map(str, self.findings))

    @property
    def sound(self) -> bool:
        return not self.findings


def verify(root: StorePath, deep: bool = False, sample: int | None = None, seed: int = 0) -> VerifyReport:
    """Check a store: metadata, sample parts, selections, every ledger entry against its files. `deep`: also check that
    rows marked sound are finite and not zero, and others NaN. `sample`: compare the bytes of so many shards only, drawn
    by `seed`; all else is always checked in full. Raises as `read_record`: without it nothing can be judged."""
    store = Store.open(root)
    every = range(store.shards)
    shards = every if sample is None else drawn_shards(len(every), sample, seed)
    findings: list[Problem] = []
    cards: dict[str, TeacherCard] = {}
    for slug in teacher_folders(root):
        try:
            card = read_card(root, slug)
        except CorruptStoreError as error:
            findings.append(Problem(f"{teacher_group(slug)}/zarr.json", str(error), teacher=slug))
            continue
        if card is not None:
            cards[slug] = card
            for name, document in array_documents(store.record, card):
                findings += _check_document(root, name, document)
    if cards:
        findings += _check_document(root, "teachers/zarr.json", group_document())
    checksums: dict[int, str] = {}
    findings += _check_folded(store, shards)
    findings += _check_parts(store, shards, checksums)
    scan = scan_ledger(root)
    entries = scan.entries()
    findings += (Problem(file, what if file in what else f"{file}: {what}") for file, what in scan.faults)
    for shard, slug in scan.disputed:
        what = f"{ledger_entry(shard, slug)} and {folded_entries(shard)} vouch for different features"
        findings.append(Problem(folded_entries(shard), what, shard, slug))
    vouched = {(entry.shard, entry.samples_sha256) for entry in entries}
    for shard in dict.fromkeys(entry.shard for entry in entries):
        if shard in checksums and (shard, checksums[shard]) not in vouched:  # the rows were changed
            del checksums[shard]
            name = sample_part(shard)
            what = f"{name}: not the sample rows that the features of this shard were made from"
            findings.append(Problem(name, what, shard))
    findings += (Problem(name, what) for name, what in inputs_faults(store, shards))
    findings += (Problem(name, what) for name, what in selection_faults(store, cards))
    bad_teachers = {finding.teacher for finding in findings if finding.shard is None and finding.teacher}
    # Entries of shards outside the grid, or out of a damaged file, are checked with any sample.
    unsure, check = scan.unsure, EntryCheck(store, checksums, deep)
    looked_at = [
        entry for entry in entries if entry.shard in shards or entry.shard not in every or entry.place in unsure
    ]
    for entry in looked_at:
        faults: Iterable[tuple[str, str]] = ()
        if card := cards.get(entry.teacher):
            faults = check.faults(card, entry)
        elif entry.teacher not in bad_teachers:
            faults = [("", f"teacher {entry.teacher} has no card in this store")]
        for file, what in faults:
            name = file or ledger_entry(entry.shard, entry.teacher)
            said = what if what.startswith(name) else f"{name}: {what}"
            findings.append(Problem(name, said, entry.shard, entry.teacher))
    temporary = tuple(sorted(name_in(root, path) for path in temporary_files(root)))
    orphans = tuple(sorted(_orphans(store, scan.files, (name for entry in entries for name in check.accounted(entry)))))
    unreadable = sum(file not in scan.folded for file, _ in scan.faults)
    return VerifyReport(len(looked_at) + unreadable, tuple(findings), temporary, orphans, deep, len(shards), len(every))


def drawn_shards(shards: int, sample: int, seed: int) -> frozenset[int]:
    """Draw `sample` different numbers below `shards`, or all when there are not so many."""
    drawn = np.random.default_rng(seed).choice(shards, min(sample, shards), replace=False)
    return frozenset(drawn.tolist())


def _check_document(root: StorePath, name: str, expected: dict[str, object]) -> Iterator[Problem]:
    """Array documents and `teachers/zarr.json` follow from the record and the card; repair writes them again."""
    try:
        found = read_json(root / name)
    except CorruptStoreError as error:
        yield Problem(name, str(error))
        return
    if wrong := document_fault(found, expected):
        yield Problem(name, f"{name} is not the metadata that the record and the card ask for ({wrong})")


def _check_parts(store: Store, shards: Collection[int], checksums: dict[int, str]) -> Iterator[Problem]:
    """Judge the sample table; the SHA-256 of each readable part goes into `checksums`."""
    keys: list[pa.ChunkedArray] = []
    for shard, rows in enumerate(iter_shards(store.record)):
        if shard not in shards:
            continue
        name = sample_part(shard)
        try:
            table, checksums[shard] = read_part(store.root, shard)
        except CorruptStoreError as error:
            yield Problem(name, f"{name}: {error}", shard)
            continue
        expected = np.arange(rows.start, rows.stop)
        # The labels of its own corpus, in a store whose append was interrupted or made before parts had one schema.
        own = sample_schema(store.record.span_of(rows.start).corpus.labels)
        if not table.schema.equals(sample_schema(store.record.labels)) and not table.schema.equals(own):
            yield Problem(name, f"{name}: its columns are not those of this store", shard)
        elif not np.array_equal(table["row"].to_numpy(), expected):
            yield Problem(name, f"{name}: its rows are not {expected[0]} to {expected[-1]}", shard)
        else:
            live = pc.invert(pc.is_in(table["status"], pa.array(["absent", "failed"])))
            keys.append(table["key"].filter(live))
    counts = pc.value_counts(pa.chunked_array(keys, pa.string()))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        first = twice[0]["values"].as_py()
        what = f"samples: {len(twice)} keys name more than one row, the first is {first!r}; index the corpus again"
        yield Problem("samples", what)


def _check_folded(store: Store, shards: Collection[int]) -> Iterator[Problem]:
    """Judge folded files: if all shards of one are looked at, its footer has to be that of its parts."""
    for path in list_folder(store.root / "samples/folded", "*.parquet"):
        file = name_in(store.root, path)
        try:
            places = read_folded_parts(path).places
            if set(shards) >= places.keys():
                parts = {shard: read_range(path, place.offset, place.length) for shard, place in places.items()}
                start = sum(map(len, parts.values()))
                if read_range(path, start, path.stat().st_size - start) != folded_end(parts):
                    raise CorruptStoreError("its footer is not that of its parts")
                if other := next((shard for shard in parts if folded_parts(shard) != file), None):
                    raise CorruptStoreError(f"it holds the part of shard {other}, which belongs elsewhere")
        except (CorruptStoreError, OSError, pa.ArrowException) as error:
            yield Problem(file, f"{file}: {error}")


def _orphans(store: Store, ledger: set[str], accounted: Iterable[str]) -> Iterator[str]:
    """Yield files in our folders that neither the ledger nor the hierarchy accounts for."""
    known = {name(shard) for shard in range(store.shards) for name in (sample_part, folded_parts)}
    known |= {*ledger, *accounted}
    selections = tuple(f"{SELECTIONS}/{name}/" for name in selection_names(store.root))
    inputs = [path.name.removesuffix(".json") for path in list_part(store.root, "inputs", "*.json")]
    known |= {f"inputs/{stem}{suffix}" for stem in inputs for suffix in (".json", ".arrow")}
    for folder in ("samples", "teachers", "ledger", "inputs", SELECTIONS):
        for path in walk_files(store.root / folder):
            name = name_in(store.root, path)
            ours = path.name == "zarr.json" or path.name.endswith(TEMPORARY_SUFFIX)
            if not (ours or name in known or name.startswith(selections)):
                yield name


def repair(root: StorePath, report: VerifyReport) -> tuple[str, ...]:
    """Drop or write again what a recent `report` names; return lines about it. Raises StoreError, BusyStoreError."""
    with only_writer(root, "mmkd store verify --repair"):
        done: list[str] = []
        # A folded file of which something is damaged goes, its parts stay: only what is damaged is lost.
        rows = {folded_parts(bad.shard) for bad in report.findings if bad.shard is not None and bad.teacher is None}
        rows |= {bad.file for bad in report.findings}
        for path in list_folder(root / "samples/folded", "*.parquet"):
            if (name := name_in(root, path)) in rows:
                unfold_parts(Store.open(root), name)
                done.append(f"unfolded {name}")
        report = verify(root, report.deep) if done else report
        # Where its teacher is unknown, no shard of these features can be kept.
        blamed = [(bad.shard, bad.teacher) for bad in report.findings if (bad.shard, bad.teacher) != (None, None)]
        doomed = {
            entry.place
            for entry in scan_ledger(root).entries()
            if any(shard in (None, entry.shard) and slug in (None, entry.teacher) for shard, slug in blamed)
        }
        # Entries first: a kill in between leaves shards without an entry, never entries without a shard.
        done += drop_entries(root, doomed)
        files = dict.fromkeys(filter(None, map(_file_to_drop, report.findings)))
        done += [f"dropped {name}" for name in sorted(files, key=lambda name: name[:7]) if _drop(root / name)]
        broken = {finding.file for finding in report.findings if finding.shard is None and finding.file not in files}
        for name, document in _derived_documents(root):
            if name in broken:
                write_document(root / name, document)
                done.append(f"wrote {name} again")
        temporary = (path for path in temporary_files(root) if isinstance(path, Path))  # URLs have none
        old = [path for path in temporary if time.time() - path.stat().st_mtime > TEMPORARY_SECONDS]
        return (*done, *(f"dropped {name_in(root, path)}" for path in old if _drop(path)))


def _drop(path: StorePath) -> bool:
    there = path.exists()
    remove_file(path)
    return there


def _file_to_drop(finding: Problem) -> str | None:
    if finding.shard is not None:
        return sample_part(finding.shard) if finding.teacher is None else None
    if finding.teacher is not None:
        return f"{teacher_group(finding.teacher)}/zarr.json"
    return finding.file if finding.file.startswith("inputs/") else None


def _derived_documents(root: StorePath) -> Iterator[tuple[str, dict[str, Any]]]:
    record = read_record(root)
    yield "teachers/zarr.json", group_document()
    for slug in teacher_folders(root):
        with suppress(CorruptStoreError):
            if card := read_card(root, slug):
                yield from array_documents(record, card)
