"""Writing a store: the hierarchy once, then whole shards.

Everything a reader may trust is written before the ledger entry that vouches for it, and every file
is atomic. Two writers of the same shard write the same bytes, so the last one does no harm.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from mmkd.store.atomic import disk_errors, write_atomically
from mmkd.store.card import TeacherCard
from mmkd.store.chunk import encode_chunk, pad_rows
from mmkd.store.errors import StoreError, TeacherMismatchError
from mmkd.store.layout import (
    FORMAT_VERSION,
    IMAGE_SOUND,
    TEXT_SOUND,
    TOWERS,
    feature_array,
    feature_chunk,
    rows_per_shard,
    shard_count,
    teacher_group,
    valid_chunk,
)
from mmkd.store.ledger import LedgerEntry, write_entry
from mmkd.store.record import CorpusRecord, StoreRecord, read_json
from mmkd.store.samples import sample_schema, write_part

FEATURE_DTYPE = np.dtype("float16")


@dataclass(frozen=True)
class ShardFeatures:
    """What one teacher said of one shard's rows.

    image, text: float16 (rows, D); rows without a sound feature may hold anything.
    valid: uint8 (rows,), bits IMAGE_SOUND and TEXT_SOUND.
    """

    image: NDArray[np.float16]
    text: NDArray[np.float16]
    valid: NDArray[np.uint8]


def create_store(root: Path, corpus: CorpusRecord, index: pa.Table) -> StoreRecord:
    """Lay a new store over an indexed corpus: the sample parts, then the root group that makes it a store.

    Args:
        root: a folder that does not exist, is empty, or holds an interrupted `create_store`.
        corpus: what the rows come from.
        index: one row per input with the columns of `sample_schema(corpus.labels)`, in grid order.

    Raises:
        StoreError: `root` holds something else, or cannot be written.
    """
    strangers = sorted(p.name for p in root.iterdir() if p.name != "samples") if root.is_dir() else []
    if root.is_file() or strangers:
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
    with disk_errors(root):
        zarr.create_group(root, attributes={"mmkd": record.model_dump(mode="json")})
    return record


def add_teacher(root: Path, record: StoreRecord, card: TeacherCard) -> None:
    """Create the arrays of a teacher; nothing happens when the same teacher is there already.

    Raises:
        TeacherMismatchError: other weights, preprocessing or tokenizer lie under this name.
    """
    metadata = root / teacher_group(card.slug) / "zarr.json"
    if metadata.is_file():
        present = TeacherCard.from_attributes(read_json(metadata)["attributes"]["mmkd"])
        if present.digest != card.digest:
            raise TeacherMismatchError(
                f"{root} holds {card.slug} with digest {present.digest} ({present.source}), but {card.source} has "
                f"digest {card.digest}: weights, preprocessing or tokenizer differ; "
                "use the old teacher, another name, or a new store"
            )
        return
    with disk_errors(root):
        _create_arrays(root, record, card)


def _create_arrays(root: Path, record: StoreRecord, card: TeacherCard) -> None:
    group = zarr.open_group(root, mode="r+")
    for tower in TOWERS:
        group.create_array(
            feature_array(card.slug, tower),
            shape=(record.rows, card.dim),
            chunks=(record.rows_per_shard, card.dim),
            dtype=FEATURE_DTYPE,
            fill_value=np.nan,
            serializer=BytesCodec(endian="little"),
            compressors=Crc32cCodec(),
            overwrite=True,
        )
    group.create_array(
        f"{teacher_group(card.slug)}/valid",
        shape=(record.rows,),
        chunks=(record.rows_per_shard,),
        dtype="uint8",
        fill_value=0,
        serializer=BytesCodec(),
        compressors=Crc32cCodec(),
        overwrite=True,
    )
    # The card last: a teacher without one was not created to the end, and is created again.
    group.require_group(teacher_group(card.slug)).attrs["mmkd"] = card.model_dump(mode="json")


def write_shard(
    root: Path, record: StoreRecord, card: TeacherCard, shard: int, features: ShardFeatures, samples_sha256: str
) -> LedgerEntry:
    """Write one shard of one teacher and vouch for it.

    Features of rows whose bit is not set in `valid` are written as NaN: missing is never zero.

    Raises:
        StoreError: the disk is full or read-only. The shard then counts as not done.
    """
    rows = len(features.valid)
    crc: dict[str, str] = {}
    for tower, bit in zip(TOWERS, (IMAGE_SOUND, TEXT_SOUND), strict=True):
        values: NDArray[np.float16] = getattr(features, tower).astype(FEATURE_DTYPE, copy=True)
        values[(features.valid & bit) == 0] = np.nan
        data, crc[tower] = encode_chunk(pad_rows(values, record.rows_per_shard, np.nan))
        write_atomically(root / feature_chunk(card.slug, tower, shard), data)
    data, crc["valid"] = encode_chunk(pad_rows(features.valid, record.rows_per_shard, 0))
    write_atomically(root / valid_chunk(card.slug, shard), data)
    entry = LedgerEntry(
        shard=shard,
        teacher=card.slug,
        teacher_digest=card.digest,
        rows=rows,
        image_rows=int(np.count_nonzero(features.valid & IMAGE_SOUND)),
        text_rows=int(np.count_nonzero(features.valid & TEXT_SOUND)),
        image_crc32c=crc["image"],
        text_crc32c=crc["text"],
        valid_crc32c=crc["valid"],
        samples_sha256=samples_sha256,
    )
    write_entry(root, entry)
    return entry


def iter_shards(record: StoreRecord) -> Iterator[range]:
    """Row ranges of the store's shards, in order; the last may be shorter."""
    for start in range(0, record.rows, record.rows_per_shard):
        yield range(start, min(start + record.rows_per_shard, record.rows))
