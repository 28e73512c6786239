"""Compare the files of a store with its ledger. Reads every byte that an entry names; changes nothing. Files are judged
one at a time against what the record, the cards and the ledger say of them, so every problem names one file, and
`repair` knows which entries can no longer be kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import TEMPORARY_SUFFIX, temporary_files, walk_files
from mmkd.base.places.remote import StorePath, name_in
from mmkd.store.card import TeacherCard, read_card, teacher_folders
from mmkd.store.chunk import read_body
from mmkd.store.encoding import ArraySpec, decode_rows, teacher_arrays, tower_arrays
from mmkd.store.hierarchy import document_fault, group_document, list_part, read_json
from mmkd.store.inputs import inputs_faults
from mmkd.store.layout import (
    PAIR_SOUND,
    SOUND_BIT,
    ledger_entry,
    sample_part,
    shard_count,
    teacher_group,
)
from mmkd.store.ledger import LedgerEntry, entry_paths, read_entry
from mmkd.store.record import Store
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.selections import FOLDER as SELECTIONS
from mmkd.store.selections import selection_faults, selection_names
from mmkd.store.writer import array_documents, iter_shards


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file."""

    file: str
    """Path inside the store."""
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
    """Result of `verify`."""

    entries: int
    """Ledger entries that were checked."""
    findings: tuple[Problem, ...]
    """Empty for a sound store."""
    temporary: tuple[str, ...]
    """Left-overs of interrupted writes: harmless."""
    orphans: tuple[str, ...]
    """Files without an entry: interrupted shards and foreign files. Readers ignore them."""
    deep: bool
    """Values were looked at too, not only checksums."""
    shards: int
    """Shards whose bytes were looked at."""
    all_shards: int
    """Shards of the store; more than `shards` if a sample was checked."""

    @property
    def problems(self) -> tuple[str, ...]:
        """One line each: place, file, fault."""
        return tuple(map(str, self.findings))

    @property
    def sound(self) -> bool:
        """True when there is no problem."""
        return not self.findings


def verify(root: StorePath, deep: bool = False, sample: int | None = None, seed: int = 0) -> VerifyReport:
    """Check a store: metadata, sample parts, selections, every ledger entry against its files. Raises NotAStoreError,
    FormatVersionError, CorruptStoreError if the root's own metadata cannot be trusted, so nothing below it can be
    judged.

    Args:
        root: the store.
        deep: also decode every feature and check that rows marked sound are finite and not zero, and others NaN.
        sample: compare the bytes of this many shards only: all teachers' chunks, sample rows and inputs of each.
            Metadata, ledger entries, selections and file names are always checked in full. None for every shard.
        seed: decides which shards; the same store and seed draw the same.
    """
    store = Store.open(root)
    record = store.record
    every = range(shard_count(record.rows, record.rows_per_shard))
    shards = every if sample is None else drawn_shards(len(every), sample, seed)
    findings: list[Problem] = []
    cards: dict[str, TeacherCard] = {}
    for slug in teacher_folders(root):
        findings += _check_teacher(store, slug, cards)
    if cards:
        findings += _check_document(root, "teachers/zarr.json", group_document())
    checksums, part_findings = _check_parts(store, shards)
    findings += part_findings
    entries: list[LedgerEntry] = []
    paths = entry_paths(root)
    for path in paths:
        name = name_in(root, path)
        try:
            entries.append(read_entry(path))
        except CorruptStoreError as error:
            findings.append(Problem(name, str(error)))
    findings += _blamed_parts(checksums, entries)
    findings += (Problem(name, what) for name, what in inputs_faults(store, shards))
    findings += (Problem(name, what) for name, what in selection_faults(store, cards))
    bad_teachers = {finding.teacher for finding in findings if finding.shard is None and finding.teacher}
    # Entries of shards outside the grid are checked with any sample.
    looked_at = [entry for entry in entries if entry.shard in shards or entry.shard not in every]
    for entry in looked_at:
        card = cards.get(entry.teacher)
        if card is not None:
            findings += _check_entry(store, card, entry, checksums, deep)
        elif entry.teacher not in bad_teachers:
            name = ledger_entry(entry.shard, entry.teacher)
            findings.append(
                Problem(name, f"{name}: teacher {entry.teacher} has no card in this store", entry.shard, entry.teacher)
            )
    temporary = tuple(sorted(name_in(root, path) for path in temporary_files(root)))
    orphans = tuple(sorted(_orphans(store, cards, entries, {name_in(root, path) for path in paths})))
    checked = len(looked_at) + len(paths) - len(entries)  # with those that could not be read
    return VerifyReport(checked, tuple(findings), temporary, orphans, deep, len(shards), len(every))


def drawn_shards(shards: int, sample: int, seed: int) -> frozenset[int]:
    """`sample` different numbers below `shards`, or all when there are not so many."""
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
    wrong = document_fault(found, expected)
    if wrong:
        yield Problem(name, f"{name} is not the metadata that the record and the card ask for ({wrong})")


def _check_parts(store: Store, shards: Collection[int]) -> tuple[dict[int, str], list[Problem]]:
    """Return the SHA-256 of each readable sample part, and the faults of the table."""
    checksums: dict[int, str] = {}
    findings: list[Problem] = []
    keys: list[pa.ChunkedArray] = []
    for shard, rows in enumerate(iter_shards(store.record)):
        if shard not in shards:
            continue
        name = sample_part(shard)
        try:
            table, checksums[shard] = read_part(store.root, shard)
        except CorruptStoreError as error:
            findings.append(Problem(name, f"{name}: {error}", shard))
            continue
        expected = np.arange(rows.start, rows.stop)
        # The labels of its own corpus, in a store whose append was interrupted or made before parts had one schema.
        own = sample_schema(store.record.span_of(rows.start).corpus.labels)
        if not table.schema.equals(sample_schema(store.record.labels)) and not table.schema.equals(own):
            findings.append(Problem(name, f"{name}: its columns are not those of this store", shard))
        elif not np.array_equal(table["row"].to_numpy(), expected):
            findings.append(Problem(name, f"{name}: its rows are not {expected[0]} to {expected[-1]}", shard))
        else:
            live = pc.invert(pc.is_in(table["status"], pa.array(["absent", "failed"])))
            keys.append(table["key"].filter(live))
    counts = pc.value_counts(pa.chunked_array(keys, pa.string())) if keys else None
    if counts is not None:
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            first = twice[0]["values"].as_py()
            what = f"samples: {len(twice)} keys name more than one row, the first is {first!r}; index the corpus again"
            findings.append(Problem("samples", what))
    return checksums, findings


def _blamed_parts(checksums: dict[int, str], entries: list[LedgerEntry]) -> Iterator[Problem]:
    """Yield parts that no entry of their shard knows: the rows were changed, and they leave `checksums`."""
    vouched: dict[int, set[str]] = {}
    for entry in entries:
        vouched.setdefault(entry.shard, set()).add(entry.samples_sha256)
    for shard in [shard for shard, known in vouched.items() if shard in checksums and checksums[shard] not in known]:
        del checksums[shard]
        name = sample_part(shard)
        yield Problem(name, f"{name}: not the sample rows that the features of this shard were made from", shard)


def _check_entry(
    store: Store, card: TeacherCard, entry: LedgerEntry, checksums: dict[int, str], deep: bool
) -> Iterator[Problem]:
    """Judge one shard of one teacher."""
    for file, what in _entry_faults(store, card, entry, checksums, deep):
        name = file or ledger_entry(entry.shard, entry.teacher)
        yield Problem(name, what if what.startswith(name) else f"{name}: {what}", entry.shard, entry.teacher)


def _entry_faults(
    store: Store, card: TeacherCard, entry: LedgerEntry, checksums: dict[int, str], deep: bool
) -> Iterator[tuple[str, str]]:
    """Yield file ('' for the entry itself) and fault."""
    per_shard = store.record.rows_per_shard
    if not 0 <= entry.shard < shard_count(store.record.rows, per_shard):
        yield "", f"vouches for shard {entry.shard}, the store has {shard_count(store.record.rows, per_shard)}"
        return
    if card.digest != entry.teacher_digest:
        yield "", f"made with teacher digest {entry.teacher_digest}, the card says {card.digest}"
    rows = len(store.record.shard_rows(entry.shard))
    if entry.rows != rows:
        yield "", f"vouches for {entry.rows} rows, the shard has {rows}"
    if entry.shard in checksums and checksums[entry.shard] != entry.samples_sha256:
        yield sample_part(entry.shard), "not the sample rows that these features were made from"
    if not entry.fits(card.encoding):
        yield "", f"its members are not those of a shard in {card.encoding}"
        return
    *_, valid_spec = teacher_arrays(card.encoding, card.dim)
    file = valid_spec.chunk(card.slug, entry.shard)
    try:
        valid = _read_chunk(store, valid_spec, entry)
    except CorruptStoreError as error:
        yield file, str(error)
        return
    if (valid & ~np.uint8(PAIR_SOUND)).any() or valid[rows:].any():
        yield file, "marks something else than image and text of this shard's rows"
    for tower, bit in SOUND_BIT.items():
        specs = tower_arrays(tower, card.encoding, card.dim)
        file = specs[0].chunk(card.slug, entry.shard)
        counted, sound = getattr(entry, f"{tower}_rows"), (valid & bit) > 0
        if int(sound.sum()) != counted:
            yield file, f"{int(sound.sum())} sound rows, the ledger says {counted}"
        arrays = []
        for spec in specs:
            try:
                arrays.append(_read_chunk(store, spec, entry))
            except CorruptStoreError as error:
                yield spec.chunk(card.slug, entry.shard), str(error)
        if deep and len(arrays) == len(specs):
            yield from ((file, what) for what in value_faults(decode_rows(arrays), sound))


def _read_chunk(store: Store, spec: ArraySpec, entry: LedgerEntry) -> NDArray[Any]:
    """Return values of one chunk, checked against its entry."""
    per_shard = store.record.rows_per_shard
    name = spec.chunk(entry.teacher, entry.shard)
    body = read_body(store.root, name, spec.chunk_bytes(per_shard), entry.crc32c(spec))
    return np.frombuffer(body, dtype=np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape(per_shard))


def value_faults(values: NDArray[np.floating[Any]], sound: NDArray[np.bool_]) -> Iterator[str]:
    """Yield the faults in the values of a chunk: float (R, D), and bool (R,) where they are marked sound."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
    if bad := np.count_nonzero(sound & ~(np.isfinite(norms) & (norms > 0))):
        yield f"{bad} rows are marked sound but are zero or not finite"
    if filled := np.count_nonzero(~sound & ~np.isnan(values).all(axis=1)):
        yield f"{filled} rows are not marked sound but hold values; missing rows hold NaN"


def _orphans(
    store: Store,
    cards: Mapping[str, TeacherCard],
    entries: list[LedgerEntry],
    named: set[str],
) -> Iterator[str]:
    """Yield files in our folders that neither the ledger nor the hierarchy accounts for."""
    known = {sample_part(shard) for shard in range(shard_count(store.record.rows, store.record.rows_per_shard))} | named
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
            ours = (
                path.name == "zarr.json"
                or path.name.endswith(TEMPORARY_SUFFIX)
                or name in known
                or name.startswith(selections)
            )
            if not ours:
                yield name
