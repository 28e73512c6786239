"""Compare the files of a store with its ledger, and drop what was found unsound. Every problem names one file. `repair`
guesses nothing: an entry that cannot be kept is deleted (its shard counts as not done), a sample part that cannot be
trusted is deleted (the next extraction lists it again), and metadata that follows from the record and the card is
written again."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors, temporary_files, walk_files
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath, name_in
from mmkd.store.card import TeacherCard, read_card, teacher_folders
from mmkd.store.encoding import decode_rows, teacher_arrays, tower_arrays
from mmkd.store.hierarchy import document_fault, group_document, list_part, read_json, write_document
from mmkd.store.inputs import inputs_faults
from mmkd.store.layout import PAIR_SOUND, SOUND_BIT, ledger_entry, sample_part, teacher_group
from mmkd.store.ledger import LedgerEntry, read_entry
from mmkd.store.record import Store, read_record
from mmkd.store.samples import read_part, sample_schema
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
        findings += _check_teacher(store, slug, cards)
    if cards:
        findings += _check_document(root, "teachers/zarr.json", group_document())
    checksums: dict[int, str] = {}
    findings += _check_parts(store, shards, checksums)
    entries: list[LedgerEntry] = []
    paths = list_part(root, "ledger", "*.json")
    for path in paths:
        try:
            entries.append(read_entry(path))
        except CorruptStoreError as error:
            findings.append(Problem(name_in(root, path), str(error)))
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
    # Entries of shards outside the grid are checked with any sample.
    looked_at = [entry for entry in entries if entry.shard in shards or entry.shard not in every]
    for entry in looked_at:
        faults: Iterable[tuple[str, str]] = ()
        if card := cards.get(entry.teacher):
            faults = _entry_faults(store, card, entry, checksums, deep)
        elif entry.teacher not in bad_teachers:
            faults = [("", f"teacher {entry.teacher} has no card in this store")]
        for file, what in faults:
            name = file or ledger_entry(entry.shard, entry.teacher)
            said = what if what.startswith(name) else f"{name}: {what}"
            findings.append(Problem(name, said, entry.shard, entry.teacher))
    temporary = tuple(sorted(name_in(root, path) for path in temporary_files(root)))
    orphans = tuple(sorted(_orphans(store, cards, entries, {name_in(root, path) for path in paths})))
    checked = len(looked_at) + len(paths) - len(entries)  # with those that could not be read
    return VerifyReport(checked, tuple(findings), temporary, orphans, deep, len(shards), len(every))


def drawn_shards(shards: int, sample: int, seed: int) -> frozenset[int]:
    """Draw `sample` different numbers below `shards`, or all when there are not so many."""
    drawn = np.random.default_rng(seed).choice(shards, min(sample, shards), replace=False)
    return frozenset(drawn.tolist())


def _check_teacher(store: Store, slug: str, cards: dict[str, TeacherCard]) -> Iterator[Problem]:
    """Judge a teacher's card and array documents; a sound card goes into `cards`."""
    try:
        card = read_card(store.root, slug)
    except CorruptStoreError as error:
        yield Problem(f"{teacher_group(slug)}/zarr.json", str(error), teacher=slug)
        return
    if card is not None:
        cards[slug] = card
        for name, document in array_documents(store.record, card):
            yield from _check_document(store.root, name, document)


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


def _entry_faults(
    store: Store, card: TeacherCard, entry: LedgerEntry, checksums: dict[int, str], deep: bool
) -> Iterator[tuple[str, str]]:
    """Judge one shard of one teacher: yield file ('' for the entry itself) and fault."""
    if not 0 <= entry.shard < store.shards:
        yield "", f"vouches for shard {entry.shard}, the store has {store.shards}"
        return
    if card.digest != entry.teacher_digest:
        yield "", f"made with teacher digest {entry.teacher_digest}, the card says {card.digest}"
    rows, per_shard = len(store.record.shard_rows(entry.shard)), store.record.rows_per_shard
    if entry.rows != rows:
        yield "", f"vouches for {entry.rows} rows, the shard has {rows}"
    if entry.shard in checksums and checksums[entry.shard] != entry.samples_sha256:
        yield sample_part(entry.shard), "not the sample rows that these features were made from"
    if not entry.fits(card.encoding):
        yield "", f"its members are not those of a shard in {card.encoding}"
        return
    valid_spec = teacher_arrays(card.encoding, card.dim)[-1]
    file = valid_spec.chunk(card.slug, entry.shard)
    try:
        valid = valid_spec.read(store.root, file, entry.crc32c(valid_spec), per_shard)
    except CorruptStoreError as error:
        yield file, str(error)
        return
    if (valid & ~np.uint8(PAIR_SOUND)).any() or valid[rows:].any():
        yield file, "marks something else than image and text of this shard's rows"
    for tower, bit in SOUND_BIT.items():
        specs = tower_arrays(tower, card.encoding, card.dim)
        files = [spec.chunk(card.slug, entry.shard) for spec in specs]
        counted, sound = getattr(entry, f"{tower}_rows"), (valid & bit) > 0
        if int(sound.sum()) != counted:
            yield files[0], f"{int(sound.sum())} sound rows, the ledger says {counted}"
        arrays = []
        for spec, file in zip(specs, files, strict=True):
            try:
                arrays.append(spec.read(store.root, file, entry.crc32c(spec), per_shard))
            except CorruptStoreError as error:
                yield file, str(error)
        if deep and len(arrays) == len(specs):
            yield from ((files[0], what) for what in _value_faults(decode_rows(arrays).astype(np.float64), sound))


def _value_faults(values: NDArray[np.float64], sound: NDArray[np.bool_]) -> Iterator[str]:
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(values, axis=1)
    if bad := np.count_nonzero(sound & ~(np.isfinite(norms) & (norms > 0))):
        yield f"{bad} rows are marked sound but are zero or not finite"
    if filled := np.count_nonzero(~sound & ~np.isnan(values).all(axis=1)):
        yield f"{filled} rows are not marked sound but hold values; missing rows hold NaN"


def _orphans(
    store: Store, cards: Mapping[str, TeacherCard], entries: list[LedgerEntry], named: set[str]
) -> Iterator[str]:
    """Yield files in our folders that neither the ledger nor the hierarchy accounts for."""
    known = {sample_part(shard) for shard in range(store.shards)} | named
    for entry in entries:
        # Without a card the encoding is unknown; int8 has the arrays of all encodings.
        encoding = cards[entry.teacher].encoding if entry.teacher in cards else "int8"
        known.update(spec.chunk(entry.teacher, entry.shard) for spec in teacher_arrays(encoding, 1))
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
    entries = [path.name for path in list_part(root, "ledger", "*.json")]
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


def _derived_documents(root: StorePath) -> Iterator[tuple[str, dict[str, Any]]]:
    record = read_record(root)
    yield "teachers/zarr.json", group_document()
    for slug in teacher_folders(root):
        with suppress(CorruptStoreError):
            if card := read_card(root, slug):
                yield from array_documents(record, card)


def _drop(path: StorePath) -> bool:
    there = path.exists()
    with disk_errors(path):
        path.unlink(missing_ok=True)
    return there
