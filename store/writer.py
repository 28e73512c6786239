"""Writing a store: files before their ledger entry, each of them atomically. An appended corpus begins at the next
shard boundary, so that no chunk holds rows of two corpora; the grid rows in between are absent."""

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.errors import StoreError, TeacherMismatchError, UserError
from mmkd.base.files import create_atomically, disk_errors, write_atomically
from mmkd.base.lock import LOCK_FILE, only_writer
from mmkd.base.places.remote import StorePath
from mmkd.store.card import TeacherCard, read_card, read_cards
from mmkd.store.chunk import encode_chunk, pad_rows
from mmkd.store.encoding import VALID, ArraySpec, CosineError, all_errors, cosine_error, decode_rows, encode_rows
from mmkd.store.hierarchy import array_document, encode_document, group_document, write_document
from mmkd.store.layout import (
    FORMAT_VERSION,
    MAX_SHARDS,
    SOUND_BIT,
    Tower,
    rows_per_shard,
    sample_part,
    shard_count,
    shards_per_pack,
    teacher_group,
)
from mmkd.store.ledger import (
    LedgerEntry,
    entries_of_shard,
    fold_entries,
    read_ledger,
    unfold_entries,
    write_entry,
)
from mmkd.store.record import CorpusRecord, Store, StoreRecord, read_record
from mmkd.store.samples import PartFiles, encode_part, read_part, sample_schema, with_labels, write_part


@dataclass(frozen=True)
class ShardFeatures:
    """Features of one shard from one teacher: (rows, D) of any float type, anything in rows that are not sound; None
    for a tower that the teacher has not, or the shard is not asked for. valid: uint8 (rows,), bits IMAGE_SOUND and
    TEXT_SOUND. errors: cost of the encoding, measured when not given."""

    image: NDArray[np.floating[Any]] | None
    text: NDArray[np.floating[Any]] | None
    valid: NDArray[np.uint8]
    errors: Mapping[Tower, CosineError] | None = None


def create_store(
    root: StorePath,
    corpus: CorpusRecord,
    index: pa.Table,
    per_shard: int | None = None,
    per_pack: int | None = None,
    *,
    further: Sequence[tuple[CorpusRecord, pa.Table]] = (),
) -> Store:
    """Create a store for an indexed corpus. `index`: one row per input in grid order, columns of `sample_schema`. Rows
    in a shard, shards in a pack: powers of two; chosen by the rows when not given. `further`: corpora behind it,
    numbered from shard boundaries on. Raises StoreError if `root` cannot be written, or holds anything but an
    interrupted `create_store`; UserError for more shards than a store may have."""
    refuse_strangers(root)
    per_shard = per_shard or rows_per_shard(corpus.rows)
    rows = _grid_end(0, [corpus, *(more for more, _ in further)], per_shard)
    if shard_count(rows, per_shard) > MAX_SHARDS:
        raise UserError(
            f"{rows:,} rows are more than {MAX_SHARDS:,} shards of {per_shard:,}, which a store may have; use larger "
            "shards, or a store for each part of the corpus"
        )
    record = StoreRecord(
        format=FORMAT_VERSION,
        rows=rows,
        rows_per_shard=per_shard,
        shards_per_pack=per_pack or shards_per_pack(corpus.rows, per_shard),
        corpus=corpus,
        appended=tuple(more for more, _ in further),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in ("mmkd", "zarr", "numpy", "pyarrow")},
    )
    _write_parts(root, record, [index, *(table for _, table in further)])
    write_document(root / "zarr.json", group_document(record.model_dump(mode="json")))
    return Store(root, record)


def _grid_end(start: int, corpora: Iterable[CorpusRecord], per_shard: int) -> int:
    """Return the number of grid rows once these corpora follow `start` rows, each from a shard boundary on."""
    for corpus in corpora:
        start = shard_count(start, per_shard) * per_shard + corpus.rows
    return start


def _write_parts(root: StorePath, record: StoreRecord, tables: Sequence[pa.Table]) -> None:
    """Write the sample parts of the last corpora of a record, which have these rows."""
    schema = sample_schema(record.labels)
    for span, table in zip(record.spans()[-len(tables) :], tables, strict=True):
        for shard in span.shards:
            part = table.slice(shard * record.rows_per_shard - span.rows.start, record.rows_per_shard)
            write_part(root, shard, with_labels(part, schema).cast(schema).combine_chunks())


def refuse_strangers(root: StorePath) -> None:
    """Raise StoreError if `root` is a file, or a folder that holds more than an interrupted `create_store` leaves."""
    with disk_errors(root):
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
    strangers = sorted(set(names) - {"samples", LOCK_FILE})
    if strangers or root.is_file():
        found = strangers[0] if strangers else "a file"
        raise StoreError(f"{root} is not empty (found {found}) and not an mmkd store; name a new folder for the store")


def append_rows(
    store: Store,
    corpus: CorpusRecord,
    index: pa.Table,
    *,
    further: Sequence[tuple[CorpusRecord, pa.Table]] = (),
) -> Store:
    """Append the rows of another corpus; return the longer store. `index` and `further`: as in `create_store`, `row`
    from `first_new_row`. Labels of one side become null columns of the other. Raises StoreError if the store cannot be
    written, or another process changed it; ValueError for too many shards."""
    corpora = [corpus, *(more for more, _ in further)]
    rows = _grid_end(store.record.rows, corpora, store.record.rows_per_shard)
    content = store.record.model_dump() | {"rows": rows, "appended": (*store.record.appended, *corpora)}
    longer = StoreRecord.model_validate(content)
    _refuse_other(store)  # another writer's new rows may be there
    _write_parts(store.root, longer, [index, *(table for _, table in further)])
    _refuse_other(store)
    # From here on the rows belong to the store; until here readers ignore the new parts.
    write_document(store.root / "zarr.json", group_document(longer.model_dump(mode="json")))
    appended = Store(store.root, longer)
    finish_append(appended)
    return appended


def _refuse_other(store: Store) -> None:
    if read_record(store.root) != store.record:
        raise StoreError(f"{store.root} was changed by another process meanwhile; nothing was appended, run it again")


def first_new_row(record: StoreRecord) -> int:
    """Return the grid row at which another corpus would begin: the next shard boundary."""
    return shard_count(record.rows, record.rows_per_shard) * record.rows_per_shard


def finish_append(store: Store) -> None:
    """Bring older sample parts and array documents to the record, as after an interrupted `append_rows`."""
    schema = sample_schema(store.record.labels)
    unfolded, files = False, PartFiles(store.root)
    for shard in range(store.shards):
        if shard not in files:
            continue  # dropped by a repair: the next extraction lists it again
        table, _ = read_part(store.root, shard)
        if table.schema.equals(schema):
            continue
        unfolded |= unfold_entries(store.root, range(store.shards))
        # Entries before the part, whose bytes are known by then: after a kill the same is done again.
        data, sha256 = encode_part(with_labels(table, schema).combine_chunks())
        for entry in entries_of_shard(store.root, shard).values():
            write_entry(store.root, entry.model_copy(update={"samples_sha256": sha256}))
        write_atomically(store.root / sample_part(shard), data)
    if unfolded:
        fold_entries(store.root)
    for card in read_cards(store.root).values():
        for name, document in array_documents(store.record, card):
            path = store.root / name
            if not path.is_file() or path.read_bytes() != encode_document(document):
                write_document(path, document)


def move_corpus(root: StorePath, corpus_root: StorePath, number: int = 0) -> Store:
    """Note that the files of corpus `number`, counted from 0, are below `corpus_root` now, also for what a recipe makes
    of them. Raises UserError if there is
    no such corpus; StoreError if `root` is no store or cannot be written; BusyStoreError."""
    read_record(root)
    with only_writer(root, "mmkd store relocate"):
        record = read_record(root)
        corpora = [span.corpus for span in record.spans()]
        if number >= len(corpora):
            raise UserError(f"{root} has no corpus {number}; it has {len(corpora)}, counted from 0")
        for place, corpus in enumerate(corpora):
            if place == number or (corpus.recipe or {}).get("corpus") == number:
                corpora[place] = corpus.model_copy(update={"root": str(corpus_root.resolve())})
        moved = record.model_copy(update={"corpus": corpora[0], "appended": tuple(corpora[1:])})
        write_document(root / "zarr.json", group_document(moved.model_dump(mode="json")))
    return Store(root, moved)


def add_teacher(store: Store, card: TeacherCard) -> None:
    """Create the arrays of a teacher unless they are there. Raises TeacherMismatchError if this name has others."""
    present = read_card(store.root, card.slug)
    if present is None:
        write_document(store.root / "teachers" / "zarr.json", group_document())
        for name, document in array_documents(store.record, card):
            write_document(store.root / name, document)
        # The card last: a teacher without one was not created to the end, and is created again.
        metadata = store.root / teacher_group(card.slug) / "zarr.json"
        create_atomically(metadata, encode_document(group_document(card.model_dump(mode="json"))))
        # Another process may have created another teacher of this name: the stored card decides.
        present = read_card(store.root, card.slug)
    if present is None or present.digest != card.digest:
        found = f"digest {present.digest} ({present.source})" if present else "no card"
        raise TeacherMismatchError(
            f"{store.root} holds {card.slug} with {found}, but {card.source} has "
            f"digest {card.digest}: weights, preprocessing or tokenizer differ; "
            "use the old teacher, another name, or a new store"
        )


def write_shard(
    store: Store, card: TeacherCard, shard: int, features: ShardFeatures, samples_sha256: str
) -> LedgerEntry:
    """Write one shard of a teacher, then its ledger entry, which is returned. `features`: in the order of the sample
    part of this SHA-256. Rows whose bit is not set in `valid`, or that the encoding cannot hold, become missing (NaN,
    no bit). Raises StoreError if the disk is full or read-only; the shard then counts as not done."""
    valid = np.zeros_like(features.valid)
    arrays: list[NDArray[Any]] = []
    members: dict[str, Any] = {}
    specs: list[ArraySpec] = []
    for tower in store.record.asked_towers(shard, card):
        values = getattr(features, tower)
        stored, sound = encode_rows(values, (features.valid & SOUND_BIT[tower]) != 0, card.encoding)
        valid[sound] |= SOUND_BIT[tower]
        arrays += stored
        specs += card.tower_arrays(tower)
        members[f"{tower}_rows"] = int(np.count_nonzero(sound))
        if len(stored) > 1:
            known = features.errors and features.errors.get(tower)
            members[f"{tower}_error"] = known or cosine_error(values, decode_rows(stored), sound)
    for spec, array in zip((*specs, VALID), (*arrays, valid), strict=True):
        data, members[f"{spec.name}_crc32c"] = encode_chunk(pad_rows(array, store.record.rows_per_shard, spec.fill))
        write_atomically(store.root / spec.loose(card.slug, shard), data)
    members |= {"teacher_digest": card.digest, "rows": len(valid), "samples_sha256": samples_sha256}
    entry = LedgerEntry(shard=shard, teacher=card.slug, **members)
    write_entry(store.root, entry)
    return entry


def note_encoding_error(store: Store, slug: str) -> None:
    """Write into an int8 card what its encoding cost by the ledger, once every shard is there; the digest does not
    change. Raises CorruptStoreError if the card or an entry cannot be read; StoreError if it cannot be written."""
    card = read_card(store.root, slug)
    if card is None or card.encoding != "int8":
        return
    entries = [entry for (_, teacher), entry in sorted(read_ledger(store.root).items()) if teacher == slug]
    if len(entries) < len(store.record.asked_shards(card)):
        return
    measured = {}
    for tower in card.towers:
        measured[tower] = all_errors((getattr(entry, f"{tower}_error"), entry.sound_rows(tower)) for entry in entries)
    if card.encoding_error != measured:
        noted = card.model_copy(update={"encoding_error": measured})
        write_document(store.root / teacher_group(slug) / "zarr.json", group_document(noted.model_dump(mode="json")))


def iter_shards(record: StoreRecord) -> Iterator[range]:
    """Yield row ranges of the store's shards, in order; the last of a corpus may be shorter."""
    for shard in range(shard_count(record.rows, record.rows_per_shard)):
        yield record.shard_rows(shard)


def array_documents(record: StoreRecord, card: TeacherCard) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path inside the store and the document of each array of one teacher."""
    for spec in card.arrays:
        inner = spec.shape(record.rows_per_shard)
        pack = spec.shape(record.rows_per_shard * record.shards_per_pack)
        yield spec.document(card.slug), array_document(spec.shape(record.rows), pack, spec.dtype, inner=inner)
