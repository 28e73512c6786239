"""Is what lies on disk what the ledger vouches for? Reads every byte that an entry names; changes nothing.

Files are judged one at a time against what the record, the cards and the ledger say of them, so every
problem names one file, and `repair` knows which entries can no longer be kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
from mmkd.store.hierarchy import document_fault, group_document, read_json
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
from mmkd.store.record import StoreRecord, read_record
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.verify_report import Problem, VerifyReport
from mmkd.store.writer import array_documents, iter_shards


def verify(root: StorePath, deep: bool = False, sample: int | None = None, seed: int = 0) -> VerifyReport:
    """Check a store: metadata, sample parts, selections, every ledger entry against the bytes it vouches for.

    Args:
        root: the store.
        deep: also decode every feature and hold rows marked sound to be finite and not zero, and others to be NaN.
        sample: compare the bytes of so many shards only: all teachers' chunks, sample rows and inputs of each.
            Metadata, ledger entries, selections and the names of files are looked at in full. None for every shard.
        seed: decides which shards; the same store and seed draw the same.

    Raises:
        NotAStoreError, FormatVersionError, CorruptStoreError: the root's own metadata cannot be trusted, so
            nothing below it can be judged.
    """
    from mmkd.store.selections import selection_faults  # noqa: PLC0415 - selections read stores, which verify

    record = read_record(root)
    every = range(shard_count(record.rows, record.rows_per_shard))
    shards = every if sample is None else drawn_shards(len(every), sample, seed)
    findings: list[Problem] = []
    cards: dict[str, TeacherCard] = {}
    for slug in teacher_folders(root):
        findings += _check_teacher(root, record, slug, cards)
    if cards:
        findings += _check_document(root, "teachers/zarr.json", group_document())
    checksums, part_findings = _check_parts(root, record, shards)
    findings += part_findings
    entries: list[LedgerEntry] = []
    paths = list(entry_paths(root))
    for path in paths:
        name = name_in(root, path)
        try:
            entries.append(read_entry(path))
        except CorruptStoreError as error:
            findings.append(Problem(name, str(error)))
    findings += _blamed_parts(checksums, entries)
    findings += (Problem(name, what) for name, what in inputs_faults(root, record, shards))
    findings += (Problem(name, what) for name, what in selection_faults(root, record, cards))
    bad_teachers = {finding.teacher for finding in findings if finding.shard is None and finding.teacher}
    # An entry of a shard that cannot be is nobody's sample.
    looked_at = [entry for entry in entries if entry.shard in shards or entry.shard not in every]
    for entry in looked_at:
        card = cards.get(entry.teacher)
        if card is not None:
            findings += _check_entry(root, record, card, entry, checksums, deep)
        elif entry.teacher not in bad_teachers:
            name = ledger_entry(entry.shard, entry.teacher)
            findings.append(
                Problem(name, f"{name}: teacher {entry.teacher} has no card in this store", entry.shard, entry.teacher)
            )
    temporary = tuple(sorted(name_in(root, path) for path in temporary_files(root)))
    orphans = tuple(sorted(_orphans(root, record, cards, entries, {name_in(root, path) for path in paths})))
    checked = len(looked_at) + len(paths) - len(entries)  # with those that could not be read
    return VerifyReport(checked, tuple(findings), temporary, orphans, deep, len(shards), len(every))


def drawn_shards(shards: int, sample: int, seed: int) -> frozenset[int]:
    """`sample` different numbers below `shards`, or all when there are not so many."""
    drawn = np.random.default_rng(seed).choice(shards, min(sample, shards), replace=False)
    return frozenset(drawn.tolist())


def _check_teacher(root: StorePath, record: StoreRecord, slug: str, cards: dict[str, TeacherCard]) -> Iterator[Problem]:
    """Judge a teacher's card and array documents; a sound card goes into `cards`."""
    try:
        card = read_card(root, slug)
    except CorruptStoreError as error:
        yield Problem(f"{teacher_group(slug)}/zarr.json", str(error), teacher=slug)
        return
    if card is not None:
        cards[slug] = card
        for name, document in array_documents(record, card):
            yield from _check_document(root, name, document)


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


def _check_parts(root: StorePath, record: StoreRecord, shards: Collection[int]) -> tuple[dict[int, str], list[Problem]]:
    """SHA-256 of each readable sample part, and what is wrong with the table."""
    checksums: dict[int, str] = {}
    findings: list[Problem] = []
    keys: list[pa.ChunkedArray] = []
    for shard, rows in enumerate(iter_shards(record)):
        if shard not in shards:
            continue
        name = sample_part(shard)
        try:
            table, checksums[shard] = read_part(root, shard)
        except CorruptStoreError as error:
            findings.append(Problem(name, f"{name}: {error}", shard))
            continue
        expected = np.arange(rows.start, rows.stop)
        # The labels of its own corpus, in a store whose append was interrupted or made before parts had one schema.
        own = sample_schema(record.span_of(rows.start).corpus.labels)
        if not table.schema.equals(sample_schema(record.labels)) and not table.schema.equals(own):
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
            what = f"samples: {len(twice)} keys name more than one row, the first is {first!r}; index the corpus anew"
            findings.append(Problem("samples", what))
    return checksums, findings


def _blamed_parts(checksums: dict[int, str], entries: list[LedgerEntry]) -> Iterator[Problem]:
    """Parts that no entry of their shard knows: the rows were changed, and they leave `checksums`."""
    vouched: dict[int, set[str]] = {}
    for entry in entries:
        vouched.setdefault(entry.shard, set()).add(entry.samples_sha256)
    for shard in [shard for shard, known in vouched.items() if shard in checksums and checksums[shard] not in known]:
        del checksums[shard]
        name = sample_part(shard)
        yield Problem(name, f"{name}: not the sample rows that the features of this shard were made from", shard)


def _check_entry(
    root: StorePath, record: StoreRecord, card: TeacherCard, entry: LedgerEntry, checksums: dict[int, str], deep: bool
) -> Iterator[Problem]:
    """Judge one shard of one teacher."""
    for file, what in _entry_faults(root, record, card, entry, checksums, deep):
        name = file or ledger_entry(entry.shard, entry.teacher)
        yield Problem(name, what if what.startswith(name) else f"{name}: {what}", entry.shard, entry.teacher)


def _entry_faults(
    root: StorePath, record: StoreRecord, card: TeacherCard, entry: LedgerEntry, checksums: dict[int, str], deep: bool
) -> Iterator[tuple[str, str]]:
    """File ('' for the entry itself) and what is wrong with it."""
    per_shard = record.rows_per_shard
    if not 0 <= entry.shard < shard_count(record.rows, per_shard):
        yield "", f"vouches for shard {entry.shard}, the store has {shard_count(record.rows, per_shard)}"
        return
    if card.digest != entry.teacher_digest:
        yield "", f"made with teacher digest {entry.teacher_digest}, the card says {card.digest}"
    rows = len(record.shard_rows(entry.shard))
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
        valid = _checked(root, record, valid_spec, entry)
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
                arrays.append(_checked(root, record, spec, entry))
            except CorruptStoreError as error:
                yield spec.chunk(card.slug, entry.shard), str(error)
        if deep and len(arrays) == len(specs):
            yield from ((file, what) for what in value_faults(decode_rows(arrays), sound))


def _checked(root: StorePath, record: StoreRecord, spec: ArraySpec, entry: LedgerEntry) -> NDArray[Any]:
    """One chunk's values, when its bytes are what the entry vouches for."""
    per_shard = record.rows_per_shard
    name = spec.chunk(entry.teacher, entry.shard)
    body = read_body(root, name, spec.chunk_bytes(per_shard), entry.crc32c(spec))
    return np.frombuffer(body, dtype=np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape(per_shard))


def value_faults(values: NDArray[np.floating[Any]], sound: NDArray[np.bool_]) -> Iterator[str]:
    """What is wrong with the values of a chunk: float (R, D), and bool (R,) where they are marked sound."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
    bad = int(np.count_nonzero(sound & ~(np.isfinite(norms) & (norms > 0))))
    if bad:
        yield f"{bad} rows are marked sound but are zero or not finite"
    told = int(np.count_nonzero(~sound & ~np.isnan(values).all(axis=1)))
    if told:
        yield f"{told} rows are not marked sound but hold values; missing rows hold NaN"


def _orphans(
    root: StorePath,
    record: StoreRecord,
    cards: Mapping[str, TeacherCard],
    entries: list[LedgerEntry],
    named: set[str],
) -> Iterator[str]:
    """Files in our three folders that neither the ledger nor the hierarchy accounts for."""
    known = {sample_part(shard) for shard in range(shard_count(record.rows, record.rows_per_shard))} | named
    for entry in entries:
        # Without a card nobody knows the encoding; int8 has all arrays that any has.
        encoding = cards[entry.teacher].encoding if entry.teacher in cards else "int8"
        known.update(spec.chunk(entry.teacher, entry.shard) for spec in teacher_arrays(encoding, 1))
    for folder in ("samples", "teachers", "ledger"):
        for path in walk_files(root / folder):
            name = name_in(root, path)
            ours = path.name == "zarr.json" or path.name.endswith(TEMPORARY_SUFFIX) or name in known
            if not ours:
                yield name
