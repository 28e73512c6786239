"""The ledger: one small JSON file for each shard of each teacher, written last, authoritative: a chunk without an entry
counts as absent. Equal work gives equal bytes (times go to `runs/`)."""

from __future__ import annotations

import re

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import disk_errors, write_atomically
from mmkd.base.places.remote import StorePath, in_parallel
from mmkd.store.encoding import ArraySpec, CosineError, Encoding
from mmkd.store.hierarchy import Document, list_part, parse_document, read_file
from mmkd.store.layout import ledger_entry

MAX_ENTRY_BYTES = 1 << 16
"""An entry has some 300 bytes; larger ones are refused unread."""

_NAME = re.compile(r"(\d{5,})\.(.+)\.json")


class LedgerEntry(Document):
    """Contents of one shard of one teacher, with checksums."""

    shard: int
    teacher: str
    teacher_digest: str
    rows: int
    """Rows of the corpus in this shard, sound or not."""
    image_rows: int
    text_rows: int
    image_crc32c: str
    text_crc32c: str
    valid_crc32c: str
    samples_sha256: str
    """Digest of the shard's sample part, which ties features to rows."""
    image_scale_crc32c: str | None = None
    text_scale_crc32c: str | None = None
    """CRC32C of the scales; int8 only."""
    image_error: CosineError | None = None
    text_error: CosineError | None = None
    """Loss from encoding in this shard; int8 only."""

    def crc32c(self, spec: ArraySpec) -> str:
        """Return the checksum of this shard's chunk of one array; empty when the entry has none."""
        return getattr(self, f"{spec.name}_crc32c") or ""

    def same_features(self, other: LedgerEntry) -> bool:
        """Return True if both vouch for the same arrays; sample rows may have got columns since."""
        return self == other.model_copy(update={"samples_sha256": self.samples_sha256})

    def fits(self, encoding: Encoding) -> bool:
        """Return True when members of int8 are present exactly for int8."""
        extra = (self.image_scale_crc32c, self.text_scale_crc32c, self.image_error, self.text_error)
        return all(member is not None for member in extra) if encoding == "int8" else extra == (None,) * 4


def write_entry(root: StorePath, entry: LedgerEntry) -> None:
    """Write a shard's entry. Call it when every file that the entry names is in place."""
    data = entry.model_dump_json(indent=1, exclude_none=True) + "\n"
    write_atomically(root / ledger_entry(entry.shard, entry.teacher), data.encode())


def read_entry(path: StorePath) -> LedgerEntry:
    """Read one entry. Raises CorruptStoreError if the file is not an entry, or not that of the shard in its name."""
    name = _NAME.fullmatch(path.name)
    entry = parse_document(LedgerEntry, read_file(path, MAX_ENTRY_BYTES), path)
    if name is None or (entry.shard, entry.teacher) != (int(name[1]), name[2]):
        raise CorruptStoreError(f"{path} vouches for shard {entry.shard} of {entry.teacher}, not for what it is named")
    return entry


def remove_entry(root: StorePath, shard: int, slug: str) -> None:
    """Delete a shard's entry, before any of its files changes. Raises StoreError if the store cannot be written."""
    path = root / ledger_entry(shard, slug)
    with disk_errors(path):
        path.unlink(missing_ok=True)


def entries_of_shard(root: StorePath, shard: int) -> dict[str, LedgerEntry]:
    """Return the entries of one shard as they are now, by teacher. Raises CorruptStoreError as `read_entry`."""
    entries = in_parallel(read_entry, list_part(root, "ledger", f"{shard:05d}.*.json"), root)
    return {entry.teacher: entry for entry in entries}


def read_ledger(root: StorePath) -> dict[tuple[int, str], LedgerEntry]:
    """Read all entries, keyed by (shard, teacher). Raises as `list_part` and `read_entry`."""
    entries = in_parallel(read_entry, list_part(root, "ledger", "*.json"), root)
    return {(entry.shard, entry.teacher): entry for entry in entries}
