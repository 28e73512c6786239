"""The ledger: one small JSON file for each shard of each teacher, written last. It is the truth.

A chunk that no entry vouches for is not there, whatever lies on disk. Entries hold nothing that
differs between two extractions of the same corpus (times go to `runs/`), so equal work gives equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mmkd.store.atomic import disk_errors, write_atomically
from mmkd.store.errors import CorruptStoreError
from mmkd.store.layout import ledger_entry

MAX_ENTRY_BYTES = 1 << 16
"""An entry has some 300 bytes; what is larger is refused unread."""

_NAME = re.compile(r"(\d{5,})\.(.+)\.json")


class LedgerEntry(BaseModel):
    """What one shard of one teacher holds, and the checksums to prove it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int
    teacher: str
    teacher_digest: str
    rows: int
    """Rows of the corpus in this shard, sound or not."""
    image_rows: int
    """Rows with a sound image feature."""
    text_rows: int
    """Rows with a sound text feature."""
    image_crc32c: str
    text_crc32c: str
    valid_crc32c: str
    samples_sha256: str
    """Of the shard's sample part: features and rows belong together."""


def write_entry(root: Path, entry: LedgerEntry) -> None:
    """Vouch for a shard. Call it after every file that the entry names is in place."""
    data = entry.model_dump_json(indent=1) + "\n"
    write_atomically(root / ledger_entry(entry.shard, entry.teacher), data.encode())


def read_entry(path: Path) -> LedgerEntry:
    """Read one entry.

    Raises:
        CorruptStoreError: the file is not an entry, or not the entry of the shard it is named for.
    """
    name = _NAME.fullmatch(path.name)
    try:
        if path.stat().st_size > MAX_ENTRY_BYTES:
            raise CorruptStoreError(f"{path} is larger than {MAX_ENTRY_BYTES} bytes: not a ledger entry")
        entry = LedgerEntry.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CorruptStoreError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CorruptStoreError(f"{path} is not a ledger entry: {error.errors()[0]['msg']}") from error
    if name is None or (entry.shard, entry.teacher) != (int(name[1]), name[2]):
        raise CorruptStoreError(f"{path} vouches for shard {entry.shard} of {entry.teacher}, not for what it is named")
    return entry


def entry_paths(root: Path) -> Iterator[Path]:
    """Paths of all entries, in order of shard, then teacher."""
    return iter(sorted((root / "ledger").glob("*.json")))


def remove_entry(root: Path, shard: int, slug: str) -> None:
    """Vouch no more for a shard: call it before any of its files changes.

    Raises:
        StoreError: the store cannot be written.
    """
    path = root / ledger_entry(shard, slug)
    with disk_errors(path):
        path.unlink(missing_ok=True)


def entries_of_shard(root: Path, shard: int) -> dict[str, LedgerEntry]:
    """The entries of one shard as they are now, by teacher.

    Raises:
        CorruptStoreError: an entry cannot be read.
    """
    entries = (read_entry(path) for path in sorted((root / "ledger").glob(f"{shard:05d}.*.json")))
    return {entry.teacher: entry for entry in entries}


def read_ledger(root: Path) -> dict[tuple[int, str], LedgerEntry]:
    """Read all entries, keyed by (shard, teacher).

    Raises:
        CorruptStoreError: an entry cannot be read.
    """
    entries = (read_entry(path) for path in entry_paths(root))
    return {(entry.shard, entry.teacher): entry for entry in entries}
