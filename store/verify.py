"""Is what lies on disk what the ledger vouches for? Reads every byte; changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmkd.store.atomic import temporary_files
from mmkd.store.card import TeacherCard
from mmkd.store.chunk import checked_body
from mmkd.store.errors import CorruptStoreError
from mmkd.store.layout import IMAGE_SOUND, TEXT_SOUND, TOWERS, feature_chunk, ledger_entry, sample_part, valid_chunk
from mmkd.store.ledger import LedgerEntry, entry_paths, read_entry
from mmkd.store.record import StoreRecord


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    entries: int
    """Ledger entries that were checked."""
    problems: tuple[str, ...]
    """One line each: the file, what is wrong. Empty for a sound store."""
    temporary: tuple[str, ...]
    """Left-overs of interrupted writes: harmless."""

    @property
    def sound(self) -> bool:
        """True when there is no problem."""
        return not self.problems


def verify(root: Path, record: StoreRecord, teachers: Mapping[str, TeacherCard]) -> VerifyReport:
    """Check every ledger entry against its files: presence, size, CRC32C, digests, counts, finite values."""
    problems: list[str] = []
    entries = 0
    for path in entry_paths(root):
        entries += 1
        try:
            entry = read_entry(path)
            shard = f"shard {entry.shard} of {entry.teacher}"
            problems += [f"{shard}: {problem}" for problem in check_entry(root, record, teachers, entry)]
        except CorruptStoreError as error:
            problems.append(str(error))
    temporary = tuple(sorted(str(path.relative_to(root)) for path in temporary_files(root)))
    return VerifyReport(entries, tuple(problems), temporary)


def check_entry(
    root: Path, record: StoreRecord, teachers: Mapping[str, TeacherCard], entry: LedgerEntry
) -> Iterator[str]:
    """Yield one line for each thing that is wrong with one shard of one teacher."""
    name = ledger_entry(entry.shard, entry.teacher)
    card = teachers.get(entry.teacher)
    if card is None:
        yield f"{name}: teacher {entry.teacher} has no card in this store"
        return
    if card.digest != entry.teacher_digest:
        yield f"{name}: made with teacher digest {entry.teacher_digest}, the card says {card.digest}"
    part = root / sample_part(entry.shard)
    if not part.is_file() or hashlib.sha256(part.read_bytes()).hexdigest() != entry.samples_sha256:
        yield f"{sample_part(entry.shard)}: not the sample rows that these features were made from"
    per_shard = record.rows_per_shard
    try:
        valid = np.frombuffer(
            _body(root, valid_chunk(entry.teacher, entry.shard), per_shard, entry.valid_crc32c), dtype=np.uint8
        )
        for tower, bit in zip(TOWERS, (IMAGE_SOUND, TEXT_SOUND), strict=True):
            chunk = feature_chunk(entry.teacher, tower, entry.shard)
            crc = getattr(entry, f"{tower}_crc32c")
            values = np.frombuffer(_body(root, chunk, per_shard * card.dim * 2, crc), dtype="<f2").reshape(-1, card.dim)
            sound = (valid & bit) > 0
            if int(sound.sum()) != getattr(entry, f"{tower}_rows"):
                yield f"{chunk}: {int(sound.sum())} sound rows, the ledger says {getattr(entry, f'{tower}_rows')}"
            norms = np.linalg.norm(values[sound].astype(np.float32), axis=1)
            bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
            if len(bad):
                yield f"{chunk}: {len(bad)} rows are marked sound but are zero or not finite"
    except CorruptStoreError as error:
        yield str(error)


def _body(root: Path, name: str, expected_bytes: int, expected_crc: str) -> bytes:
    path = root / name
    if not path.is_file():
        raise CorruptStoreError(f"{name} is missing although the ledger vouches for it")
    body, crc = checked_body(path.read_bytes(), expected_bytes, name)
    if crc != expected_crc:
        raise CorruptStoreError(f"{name} has CRC32C {crc}, the ledger vouches for {expected_crc}")
    return body
