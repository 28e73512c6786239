"""Writing a store: the hierarchy once, then whole shards.

Everything a reader may trust is written before the ledger entry that vouches for it, and every file
is atomic. Two writers of the same shard write the same bytes, so the last one does no harm.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.errors import StoreError, TeacherMismatchError, UserError
from mmkd.base.files import create_atomically, write_atomically
from mmkd.base.lock import LOCK_FILE, only_writer
from mmkd.base.places.remote import StorePath
from mmkd.store.card import TeacherCard, read_card
from mmkd.store.chunk import encode_chunk, pad_rows
from mmkd.store.encoding import CosineError, cosine_error, decode_rows, encode_rows, teacher_arrays, tower_arrays
from mmkd.store.hierarchy import array_document, encode_document, group_document, write_document
from mmkd.store.layout import (
    FORMAT_VERSION,
    SOUND_BIT,
    TOWERS,
    rows_per_shard,
    shard_count,
    teacher_group,
)
from mmkd.store.ledger import LedgerEntry, read_ledger, write_entry
from mmkd.store.record import CorpusRecord, StoreRecord, read_record
from mmkd.store.samples import sample_schema, write_part


@dataclass(frozen=True)
class ShardFeatures:
    """What one teacher said of one shard's rows.

    image, text: (rows, D), any float type, stored in the card's encoding; rows that are not sound may hold anything.
    valid: uint8 (rows,), bits IMAGE_SOUND and TEXT_SOUND.
    """

    image: NDArray[np.floating[Any]]
    text: NDArray[np.floating[Any]]
    valid: NDArray[np.uint8]


def create_store(root: StorePath, corpus: CorpusRecord, index: pa.Table) -> StoreRecord:
    """Lay a new store over an indexed corpus: the sample parts, then the root group that makes it a store.

    Args:
        root: a folder that does not exist, is empty, or holds an interrupted `create_store`.
        corpus: what the rows come from.
        index: one row per input with the columns of `sample_schema(corpus.labels)`, in grid order.

    Raises:
        StoreError: `root` holds something else, or cannot be written.
    """
    strangers = sorted(p.name for p in root.iterdir() if p.name not in ("samples", LOCK_FILE)) if root.is_dir() else []
    if strangers or root.is_file():
        found = strangers[0] if strangers else "a file"
        raise StoreError(f"{root} is not empty (found {found}) and not an mmkd store; name a new folder for the store")
    per_shard = rows_per_shard(corpus.rows)
    schema = sample_schema(corpus.labels)
    for shard in range(shard_count(corpus.rows, per_shard)):
        write_part(root, shard, index.slice(shard * per_shard, per_shard).cast(schema).combine_chunks())
    record = StoreRecord(
        format=FORMAT_VERSION,
        rows=corpus.rows,
        rows_per_shard=per_shard,
        corpus=corpus,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in ("mmkd", "zarr", "numpy", "pyarrow")},
    )
    write_document(root / "zarr.json", group_document(record.model_dump(mode="json")))
    return record


def move_corpus(root: StorePath, corpus_root: StorePath, number: int = 0) -> StoreRecord:
    """Note that a corpus' files lie in another folder now; the rows stay as they are.

    Args:
        root: the store.
        corpus_root: folder that the rows' `uri` is relative to now.
        number: which corpus; 0 is the one that the store was made from, the appended ones follow.

    Raises:
        UserError: the store has no such corpus.
        StoreError: no store at `root`, or it cannot be written.
        BusyStoreError: another process writes to it.
    """
    read_record(root)
    with only_writer(root, "mmkd store relocate"):
        record = read_record(root)
        corpora = [span.corpus for span in record.spans()]
        if number >= len(corpora):
            raise UserError(f"{root} has no corpus {number}; it has {len(corpora)}, counted from 0")
        corpora[number] = corpora[number].model_copy(update={"root": str(corpus_root.resolve())})
        moved = record.model_copy(update={"corpus": corpora[0], "appended": tuple(corpora[1:])})
        write_document(root / "zarr.json", group_document(moved.model_dump(mode="json")))
    return moved


def add_teacher(root: StorePath, record: StoreRecord, card: TeacherCard) -> None:
    """Create the arrays of a teacher; nothing happens when the same teacher is there already.

    Raises:
        TeacherMismatchError: other weights, preprocessing or tokenizer lie under this name.
    """
    present = read_card(root, card.slug)
    if present is None:
        write_document(root / "teachers" / "zarr.json", group_document())
        for name, document in array_documents(record, card):
            write_document(root / name, document)
        # The card last: a teacher without one was not created to the end, and is created again.
        metadata = root / teacher_group(card.slug) / "zarr.json"
        create_atomically(metadata, encode_document(group_document(card.model_dump(mode="json"))))
        # Another process may have been first with another teacher of this name: what lies there now decides.
        present = read_card(root, card.slug)
    if present is None or present.digest != card.digest:
        found = f"digest {present.digest} ({present.source})" if present else "no card"
        raise TeacherMismatchError(
            f"{root} holds {card.slug} with {found}, but {card.source} has "
            f"digest {card.digest}: weights, preprocessing or tokenizer differ; "
            "use the old teacher, another name, or a new store"
        )


def write_shard(
    root: StorePath, record: StoreRecord, card: TeacherCard, shard: int, features: ShardFeatures, samples_sha256: str
) -> LedgerEntry:
    """Write one shard of one teacher and vouch for it.

    Features of rows whose bit is not set in `valid` are written as missing, which is never zero. So are those
    that the encoding cannot hold (not finite, zero, too large for float16); their bit is not set on disk.

    Args:
        root: the store.
        record: of the store.
        card: of the teacher, which `add_teacher` has put into the store.
        shard: its number.
        features: of the shard's inputs, in the order of its sample part.
        samples_sha256: SHA-256 in hex of that part, as `write_part` and `read_part` give it.

    Returns:
        The ledger entry, written last.

    Raises:
        StoreError: the disk is full or read-only. The shard then counts as not done.
    """
    valid = np.zeros_like(features.valid)
    arrays: list[NDArray[Any]] = []
    members: dict[str, Any] = {}
    for tower, bit in SOUND_BIT.items():
        values = getattr(features, tower)
        stored, sound = encode_rows(values, (features.valid & bit) != 0, card.encoding)
        valid[sound] |= bit
        arrays += stored
        members[f"{tower}_rows"] = int(np.count_nonzero(sound))
        if len(tower_arrays(tower, card.encoding, card.dim)) > 1:
            members[f"{tower}_error"] = cosine_error(values, decode_rows(stored), sound)
    for spec, array in zip(teacher_arrays(card.encoding, card.dim), (*arrays, valid), strict=True):
        data, members[f"{spec.name}_crc32c"] = encode_chunk(pad_rows(array, record.rows_per_shard, spec.fill))
        write_atomically(root / spec.chunk(card.slug, shard), data)
    entry = LedgerEntry(
        shard=shard,
        teacher=card.slug,
        teacher_digest=card.digest,
        rows=len(valid),
        samples_sha256=samples_sha256,
        **members,
    )
    write_entry(root, entry)
    return entry


def note_encoding_error(root: StorePath, record: StoreRecord, slug: str) -> None:
    """Write into the card what its encoding cost, once every shard is there. Nothing happens for floats.

    The digest does not change. The numbers come from the ledger, so the same entries give the same card.

    Raises:
        CorruptStoreError: the card or an entry cannot be read.
        StoreError: the store cannot be written.
    """
    card = read_card(root, slug)
    if card is None or len(tower_arrays("image", card.encoding, card.dim)) == 1:
        return
    entries = [entry for (_, teacher), entry in sorted(read_ledger(root).items()) if teacher == slug]
    if len(entries) < shard_count(record.rows, record.rows_per_shard):
        return
    measured = {}
    for tower in TOWERS:
        errors = [(getattr(entry, f"{tower}_error"), getattr(entry, f"{tower}_rows")) for entry in entries]
        rows = sum(count for _, count in errors)
        mean = sum(error.mean * count for error, count in errors) / max(rows, 1)
        measured[tower] = CosineError(mean=float(f"{mean:.2e}"), worst=max(error.worst for error, _ in errors))
    if card.encoding_error != measured:
        noted = card.model_copy(update={"encoding_error": measured})
        write_document(root / teacher_group(slug) / "zarr.json", group_document(noted.model_dump(mode="json")))


def iter_shards(record: StoreRecord) -> Iterator[range]:
    """Row ranges of the store's shards, in order; the last of a corpus may be shorter."""
    for shard in range(shard_count(record.rows, record.rows_per_shard)):
        yield record.shard_rows(shard)


def array_documents(record: StoreRecord, card: TeacherCard) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path inside the store and document of each array of one teacher."""
    for spec in teacher_arrays(card.encoding, card.dim):
        shape, chunk = spec.shape(record.rows), spec.shape(record.rows_per_shard)
        yield spec.document(card.slug), array_document(shape, chunk, spec.dtype)
