"""The ledger: one small JSON file for each shard of each teacher, written last, authoritative: a chunk without an entry
counts as absent. Finished entries are folded into one file per `FOLDED_SHARDS` shards, one per line, with a digest over
them. Whoever changes a finished shard takes its entries out of that file first, so an entry that is in both places is
the same. Equal work gives equal bytes (times go to `runs/`)."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import PurePosixPath

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import remove_file, write_atomically
from mmkd.base.places.remote import StorePath, in_parallel
from mmkd.store.encoding import ArraySpec, CosineError
from mmkd.store.hierarchy import Document, is_there, list_part, parse_document, read_file
from mmkd.store.layout import TOWERS, Encoding, Tower, folded_entries, ledger_entry

MAX_ENTRY_BYTES = 1 << 16
"""An entry has some 300 bytes; larger ones are refused unread."""
MAX_FOLDED_BYTES = 1 << 28
FOLDED_FOLDER = "ledger/folded"

_NAME = re.compile(r"(\d{5,})\.(.+)\.json")


class LedgerEntry(Document):
    """Contents of one shard of one teacher, with checksums."""

    shard: int
    teacher: str
    teacher_digest: str
    rows: int
    """Rows of the corpus in this shard, sound or not."""
    image_rows: int | None = None
    text_rows: int | None = None
    """Rows with a sound feature; None for a tower that the shard was not asked for."""
    image_crc32c: str | None = None
    text_crc32c: str | None = None
    valid_crc32c: str
    samples_sha256: str
    """Digest of the shard's sample part, which ties features to rows."""
    image_scale_crc32c: str | None = None
    text_scale_crc32c: str | None = None
    """CRC32C of the scales; int8 only."""
    image_error: CosineError | None = None
    text_error: CosineError | None = None
    """Loss from encoding in this shard; int8 only."""

    @property
    def place(self) -> tuple[int, str]:
        """Return shard and teacher: there is one entry of both."""
        return self.shard, self.teacher

    def sound_rows(self, tower: Tower) -> int:
        """Return the count of sound rows, 0 for a tower that was not asked for."""
        return getattr(self, f"{tower}_rows") or 0

    def crc32c(self, spec: ArraySpec) -> str:
        """Return the checksum of this shard's chunk of one array; empty when the entry has none."""
        return getattr(self, f"{spec.name}_crc32c") or ""

    def same_features(self, other: "LedgerEntry") -> bool:
        """Return True if both vouch for the same arrays; sample rows may have got columns since."""
        return self == other.model_copy(update={"samples_sha256": self.samples_sha256})

    def fits(self, encoding: Encoding, towers: Sequence[Tower]) -> bool:
        """Return True when the members of a tower are present exactly for `towers`, and those of int8 for int8."""
        for tower in TOWERS:
            members = {name: getattr(self, f"{tower}_{name}") for name in ("rows", "crc32c", "scale_crc32c", "error")}
            wanted = ("rows", "crc32c", *(("scale_crc32c", "error") if encoding == "int8" else ()))
            if {name for name, value in members.items() if value is not None} != set(wanted if tower in towers else ()):
                return False
        return True


def write_entry(root: StorePath, entry: LedgerEntry) -> None:
    """Write a shard's entry. Call it when every file that the entry names is in place."""
    data = entry.model_dump_json(indent=1, exclude_none=True) + "\n"
    write_atomically(root / ledger_entry(entry.shard, entry.teacher), data.encode())


def read_entry(path: StorePath) -> LedgerEntry:
    """Read one entry. Raises CorruptStoreError if the file is not an entry, or not that of the shard in its name."""
    name = _NAME.fullmatch(path.name)
    entry = parse_document(LedgerEntry, read_file(path, MAX_ENTRY_BYTES), path)
    if name is None or entry.place != (int(name[1]), name[2]):
        raise CorruptStoreError(f"{path} vouches for shard {entry.shard} of {entry.teacher}, not for what it is named")
    return entry


def remove_entry(root: StorePath, shard: int, slug: str) -> None:
    """Delete a shard's entry, before any of its files changes. Raises StoreError if the store cannot be written;
    CorruptStoreError if the folded entries cannot be read."""
    path = root / folded_entries(shard)
    if is_there(path) and (shard, slug) in read_folded(path, shard):
        write_folded(path, (entry for place, entry in read_folded(path).items() if place != (shard, slug)))
    remove_file(root / ledger_entry(shard, slug))


def _last_line(lines: Sequence[bytes]) -> bytes:
    """Return the last line of a file of folded entries: their number, and a SHA-256 over the lines above it."""
    content = b"".join(line + b"\n" for line in lines)
    return json.dumps({"entries": len(lines), "sha256": hashlib.sha256(content).hexdigest()}).encode()


def write_folded(path: StorePath, entries: Iterable[LedgerEntry]) -> None:
    """Write a file of folded entries, one per line, by shard and teacher; delete it when there are none left."""
    ordered = sorted(entries, key=lambda entry: entry.place)
    lines = [entry.model_dump_json(exclude_none=True).encode() for entry in ordered]
    if lines:
        write_atomically(path, b"".join(line + b"\n" for line in (*lines, _last_line(lines))))
    else:
        remove_file(path)


def folded_lines(path: StorePath) -> tuple[list[bytes], bool]:
    """Return the lines of a file of folded entries, and whether its digest is that of what was written. Raises
    CorruptStoreError if it cannot be read."""
    *lines, end = read_file(path, MAX_FOLDED_BYTES).removesuffix(b"\n").split(b"\n")
    return lines, end == _last_line(lines)


def read_folded(path: StorePath, shard: int | None = None) -> dict[tuple[int, str], LedgerEntry]:
    """Read folded entries, keyed by (shard, teacher), of one shard or of all. Raises CorruptStoreError if the file was
    cut or changed, or holds something else than entries of its shards."""
    lines, whole = folded_lines(path)
    if not whole:
        raise CorruptStoreError(
            f"{path} was cut or changed after it was written; `mmkd store verify --repair` keeps the entries "
            "that agree with their files"
        )
    start = b'{"shard":' if shard is None else b'{"shard":%d,' % shard
    entries = [parse_document(LedgerEntry, line, path) for line in lines if line.startswith(start)]
    found = {entry.place: entry for entry in entries}
    misplaced = any(path.name != PurePosixPath(folded_entries(number)).name for number in {s for s, _ in found})
    if misplaced or len(found) < len(entries) or (shard is None and len(entries) < len(lines)):
        raise CorruptStoreError(f"{path} holds lines that are not one entry for each of its shards and teachers")
    return found


def fold_entries(root: StorePath) -> int:
    """Move all loose entries into the files of folded ones; return how many. Raises CorruptStoreError as `read_ledger`;
    StoreError if the ledger cannot be written."""
    loose = _loose_entries(root, "*.json")
    for file in sorted({folded_entries(entry.shard) for entry in loose}):
        path = root / file
        some = {entry.place: entry for entry in loose if folded_entries(entry.shard) == file}
        before = read_folded(path) if is_there(path) else {}
        _refuse_other(root, before, some)
        write_folded(path, (before | some).values())
        for place in some:
            remove_file(root / ledger_entry(*place))
    return len(loose)


def unfold_entries(root: StorePath, shards: Collection[int]) -> bool:
    """Take the entries of shards that are about to change out of the files of folded ones; return True if there were
    any. Raises as `fold_entries`."""
    found = False
    for path in _folded_files(root):
        entries = read_folded(path)
        out = [entry for entry in entries.values() if entry.shard in shards]
        for entry in out:
            write_entry(root, entry)
        if out:
            write_folded(path, (entry for entry in entries.values() if entry.shard not in shards))
            found = True
    return found


def entries_of_shard(root: StorePath, shard: int) -> dict[str, LedgerEntry]:
    """Return the entries of one shard as they are now, by teacher. Raises CorruptStoreError as `read_ledger`."""
    loose = {entry.place: entry for entry in _loose_entries(root, f"{shard:05d}.*.json")}
    path = root / folded_entries(shard)
    folded = read_folded(path, shard) if is_there(path) else {}
    _refuse_other(root, folded, loose)
    return {slug: entry for (_, slug), entry in (folded | loose).items()}


def read_ledger(root: StorePath) -> dict[tuple[int, str], LedgerEntry]:
    """Read all entries, keyed by (shard, teacher). Raises CorruptStoreError if an entry or a file of folded ones cannot
    be read, or a shard has two different entries of a teacher; otherwise as `list_part`."""
    # Loose ones first: one that is folded meanwhile is then read from the folded file.
    loose = {entry.place: entry for entry in _loose_entries(root, "*.json")}
    folded: dict[tuple[int, str], LedgerEntry] = {}
    for some in in_parallel(read_folded, _folded_files(root), root):
        folded |= some
    _refuse_other(root, folded, loose)
    return folded | loose


def _folded_files(root: StorePath) -> Sequence[StorePath]:
    return list_part(root, FOLDED_FOLDER, "*.jsonl")


def _loose_entries(root: StorePath, pattern: str) -> list[LedgerEntry]:
    def read(path: StorePath) -> LedgerEntry | None:
        try:
            return read_entry(path)
        except CorruptStoreError:
            if is_there(path):
                raise
            return None  # folded, or taken out, since it was listed

    return [entry for entry in in_parallel(read, list_part(root, "ledger", pattern), root) if entry is not None]


def _refuse_other(
    root: StorePath, folded: dict[tuple[int, str], LedgerEntry], loose: dict[tuple[int, str], LedgerEntry]
) -> None:
    for place in folded.keys() & loose.keys():
        if folded[place] != loose[place]:
            raise CorruptStoreError(
                f"{root}: {ledger_entry(*place)} disagrees with {folded_entries(place[0])}; "
                "`mmkd store verify --repair` drops both, and `mmkd extract` makes the shard again"
            )
