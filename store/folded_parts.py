"""Sample parts of many shards in one file that is itself Parquet: the parts as they are, one after the other, and a
footer that has the row groups of all of them, moved to where they lie. Each part keeps its bytes, so its SHA-256 too.

The footer is Thrift in the compact protocol (apache/thrift, doc/specs/thrift-compact-protocol.md); its structures are
those of apache/parquet-format, src/main/thrift/parquet.thrift. pyarrow reads it and cannot write it for given bytes."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.base.errors import CorruptStoreError
from mmkd.base.places.remote import Stat, StorePath
from mmkd.store.hierarchy import read_range

KEY, MAGIC = b"mmkd", b"PAR1"
_MOST_REASONS = 1000
_FOOTER_BYTES = 1 << 19
"""Read at once: a footer of 64 parts has 150 KB."""
_NUMBERS, _I64, _BINARY, _LIST, _STRUCT = (4, 5, 6), 6, 8, 9, 12
"""Types of the compact protocol that Parquet uses; 1 and 2 are true and false."""


class _Compact:
    """Copies values from `data`, some numbers in them changed. Raises IndexError if it is cut or claims more than it
    holds; RecursionError for structures hundreds deep."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at, value, shift = self.at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise IndexError

    def fields(self, moves: Mapping[int, Any]) -> Iterator[tuple[int, int, bytes]]:
        """Yield number, type and value of each field of a structure. `moves`: field to how a number in it changes, or
        to the same for the fields below it."""
        number = 0
        while head := self.data[self.at]:
            self.at += 1
            number += head >> 4  # distances above 15 have another form, which Parquet has no use for
            yield number, head & 15, self._value(head & 15, moves.get(number))
        self.at += 1

    def _value(self, kind: int, moves: Any) -> bytes:
        start = self.at
        if kind in _NUMBERS:
            number = self.varint()
            if callable(moves):
                return _number(moves(_signed(number)))
        elif kind == _BINARY:
            self.at = self.varint() + self.at
        elif kind == _LIST:
            size, inner = self.data[start] >> 4, self.data[start] & 15
            self.at += 1
            size = self.varint() if size == 15 else size
            if size > len(self.data) - self.at:
                raise IndexError
            return self.data[start : self.at] + b"".join([self._value(inner, moves) for _ in range(size)])
        elif kind == _STRUCT:
            return _structure(self.fields(moves if isinstance(moves, Mapping) else {}))
        elif kind not in (1, 2):
            raise CorruptStoreError(f"a Parquet footer holds a value of Thrift's type {kind}")
        return self.data[start : self.at]


def _signed(number: int) -> int:
    return number >> 1 ^ -(number & 1)


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


def _number(number: int) -> bytes:
    return _varint(number << 1 ^ number >> 63)


def _structure(fields: Iterable[tuple[int, int, bytes]]) -> bytes:
    done, last = bytearray(), 0
    for number, kind, value in fields:
        done += bytes([number - last << 4 | kind]) + value
        last = number
    return bytes(done) + b"\0"


def _fields(data: bytes, by: int, group: int) -> dict[int, tuple[int, bytes]]:
    """Return type and value of each field of a part's footer, as if it lay `by` bytes further on, at this place."""

    def moved(number: int) -> int:
        return number + by if number else 0

    column = {2: moved, 3: dict.fromkeys((9, 10, 11, 14), moved), 4: moved, 6: moved}
    moves = {4: {1: column, 5: moved, 7: lambda _: group}}
    length = int.from_bytes(data[-8:-4], "little")
    try:
        if data[-4:] != MAGIC or length + 8 > len(data):
            raise IndexError
        found = {number: (kind, value) for number, kind, value in _Compact(data[-8 - length :]).fields(moves)}
        if [found.get(number, (0,))[0] for number in (2, 3, 4)] != [_LIST, _I64, _LIST]:  # schema, rows, row groups
            raise IndexError
        return found
    except (IndexError, RecursionError) as error:
        raise CorruptStoreError("a sample part does not end with a Parquet footer") from error


def folded_end(parts: Mapping[int, bytes]) -> bytes:
    """Return what follows `parts`, by ascending shard, to make one Parquet file of them. Its metadata `mmkd` are where
    each lies, and how often each status and reason occurs. Raises CorruptStoreError if they cannot be one file: one has
    several row groups, or other columns than the first."""
    first: dict[int, tuple[int, bytes]] = {}
    groups, rows, at, places = b"", 0, 0, {}
    for group, (shard, data) in enumerate(parts.items()):
        found = _fields(data, at, group)
        first = first or found
        pairs = first.get(5, (_LIST, bytes([_STRUCT])))
        likeness = all(found.get(key) == first.get(key) for key in (2, 5, 7))
        # From 15 pairs on their number has another form; pyarrow writes one.
        if found[4][1][:1] != bytes([0x10 | _STRUCT]) or not likeness or pairs[0] != _LIST or pairs[1][0] >= 0xE0:
            raise CorruptStoreError(f"sample part {shard} has several row groups, or other columns than its neighbors")
        groups += found[4][1][1:]
        rows += _signed(_Compact(found[3][1]).varint())
        places[shard] = at, len(data)
        at += len(data)
    own = json.dumps({"parts": places} | _counts(parts.values()), separators=(",", ":")).encode()
    pair = _structure((number, _BINARY, _varint(len(text)) + text) for number, text in ((1, KEY), (2, own)))
    first[3], first[4] = (_I64, _number(rows)), (_LIST, bytes([0xF0 | _STRUCT]) + _varint(len(parts)) + groups)
    first[5] = _LIST, bytes([pairs[1][0] + 0x10]) + pairs[1][1:] + pair
    footer = _structure((number, *first[number]) for number in sorted(first))
    return footer + len(footer).to_bytes(4, "little") + MAGIC


def _counts(parts: Iterable[bytes]) -> dict[str, dict[str, int]]:
    """Count each status and reason; nothing if there are many reasons, such as one for each row."""
    found: dict[str, Counter[str]] = {"status": Counter(), "reason": Counter()}
    for data in parts:
        table = pq.read_table(pa.BufferReader(data), columns=list(found), use_threads=False)
        for name, counter in found.items():
            counter.update({one["values"]: one["counts"] for one in table[name].drop_null().value_counts().to_pylist()})
    few = len(found["reason"]) <= _MOST_REASONS
    return {name: dict(sorted(counts.items())) for name, counts in found.items()} if few else {}


class PartPlace(NamedTuple):
    """Where a part lies in the folded file, and which of its row groups is the part's."""

    offset: int
    length: int
    group: int


class FoldedParts(NamedTuple):
    """What a footer says: where the part of each shard lies; rows by status and reason, None if there are too many."""

    places: dict[int, PartPlace]
    counts: dict[str, dict[str, int]] | None


def read_folded_parts(path: StorePath) -> FoldedParts:
    """Read the footer, kept for the next part of the same file. Raises CorruptStoreError if it is no footer of a folded
    file; FileNotFoundError."""
    try:
        stat = path.stat()
        if isinstance(path, Path) and not path.is_file():
            raise ValueError("it is a folder, device, pipe or socket")  # a pipe would block
        stamp = stat.stamp if isinstance(stat, Stat) else (stat.st_ino, stat.st_mtime_ns)
        return _read_footer(path, stat.st_size, stamp)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is no file of folded sample parts: {' '.join(str(error).split())}") from error


@lru_cache(4)
def _read_footer(path: StorePath, size: int, stamp: object) -> FoldedParts:
    """Read the footer of the file of this size that `stamp` tells from a later one."""
    end = read_range(path, max(0, size - _FOOTER_BYTES), _FOOTER_BYTES)
    if (length := int.from_bytes(end[-8:-4], "little") + 8) > len(end):
        end = read_range(path, max(0, size - length), length)
    own = json.loads(pq.read_metadata(pa.BufferReader(end)).metadata[KEY])
    places = {int(s): PartPlace(at, length, group) for group, (s, (at, length)) in enumerate(own["parts"].items())}
    counts = {name: dict(own[name]) for name in ("status", "reason")} if "status" in own else None
    if counts and not all(isinstance(count, int) for found in counts.values() for count in found.values()):
        raise ValueError("it counts rows by other than numbers")
    if any(not 0 <= place.offset <= place.offset + place.length <= size for place in places.values()):
        raise ValueError("it names a part outside itself")
    return FoldedParts(places, counts)


def split_parts(data: bytes) -> list[bytes]:
    """Return the parts of a folded file whose footer cannot be trusted: each ends with Parquet's mark, which a text may
    hold too, and begins with it where its own footer says."""
    ends = (match.end() for match in re.finditer(MAGIC, data))
    found = ((end - _part_bytes(data, end), end) for end in ends)
    return [data[start:end] for start, end in found if 0 <= start < end and data.startswith(MAGIC, start)]


def _part_bytes(data: bytes, end: int) -> int:
    """Return the size of the part that ends here, by its footer: that follows the columns, which follow the mark; 0 if
    there is no footer."""
    length = int.from_bytes(data[max(0, end - 8) : end - 4], "little") + 8
    if length > end:
        return 0
    try:
        metadata = pq.read_metadata(pa.BufferReader(memoryview(data)[end - length : end]))
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return 0
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return len(MAGIC) + sum(column.total_compressed_size for column in columns) + length
