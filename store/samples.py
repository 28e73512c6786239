"""The sample table: one Parquet row for every corpus input, failed ones too. Written when the corpus is indexed (status
`pending`), and again by shard when the inputs have been read. Further columns are the corpus' labels."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import LocalFileSystem

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import list_folder, remove_file, write_atomically
from mmkd.base.places.remote import RemotePath, StorePath, in_parallel
from mmkd.store.folded_parts import PartPlace, read_folded_parts, split_parts
from mmkd.store.hierarchy import is_there, read_file, read_range
from mmkd.store.layout import FOLDED_PARTS, folded_parts, sample_part
from mmkd.store.record import Store

Status = Literal["pending", "ok", "partial", "failed", "absent"]
"""`pending`: not read yet. `ok`: all that the row has is sound. `partial`: the image or the caption
failed, the other is there. `failed`: nothing usable. `absent`: no input belongs to this grid row."""

FIXED_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("modality", pa.string()),
        pa.field("uri", pa.string()),  # of the image's file, relative to the corpus root; null for a text-only row
        pa.field("offset", pa.int64()),  # bytes into the file; null when the image is the whole file
        pa.field("length", pa.int64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("width", pa.int32()),  # pixels, as decoded
        pa.field("height", pa.int32()),
        pa.field("image_sha256", pa.string()),  # of the encoded bytes
        # Of rows that are a view or a further caption of images: the rows of these images; null in all others.
        pa.field("image_rows", pa.list_(pa.int64())),
        pa.field("view_number", pa.int32()),  # from 1
        pa.field("caption_kind", pa.string()),
    ]
)


def sample_schema(labels: tuple[str, ...]) -> pa.Schema:
    """Return the schema of all sample parts of a store whose corpus has these label columns."""
    return pa.schema([*FIXED_COLUMNS, *(pa.field(label, pa.string()) for label in labels)])


def encode_part(table: pa.Table) -> tuple[bytes, str]:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    return data, hashlib.sha256(data).hexdigest()


def write_part(root: StorePath, shard: int, table: pa.Table) -> str:
    """Write one shard's rows atomically; return the SHA-256 of the file's bytes in hex."""
    data, sha256 = encode_part(table)
    write_atomically(root / sample_part(shard), data)
    return sha256


def decode_part(data: bytes) -> pa.Table:
    """Decode a sample part, page checksums included. Raises pyarrow.ArrowException, OSError if it is damaged."""
    # On this thread and from an Arrow buffer, not a Python file: an Arrow thread that still holds a Python object when
    # the interpreter ends aborts the process.
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            return file.read(use_threads=False)
    except UnicodeDecodeError as error:  # of a damaged column name, as the one fault that Arrow does not name
        raise pa.ArrowInvalid(f"a column name is not UTF-8: {error}") from error


def part_bytes(root: StorePath, shard: int) -> bytes:
    """Return one shard's part, of its own file or else folded. Raises CorruptStoreError if it is missing, or cannot be
    read."""
    path, folded = root / sample_part(shard), root / folded_parts(shard)
    for _ in range(2):  # it may be folded between two looks
        try:
            return read_file(path)
        except CorruptStoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            missing = error
        with suppress(FileNotFoundError):
            if place := read_folded_parts(folded).places.get(shard):
                return read_range(folded, place.offset, place.length)
    raise missing


def read_part(root: StorePath, shard: int) -> tuple[pa.Table, str]:
    """Read one shard's rows and the SHA-256 of their part. Raises CorruptStoreError if it is missing or damaged."""
    try:
        data = part_bytes(root, shard)
        return decode_part(data), hashlib.sha256(data).hexdigest()
    except (OSError, CorruptStoreError, pa.ArrowException) as error:
        raise CorruptStoreError(f"sample part {root / sample_part(shard)} cannot be read: {error}") from error


def _numbered(root: StorePath, folder: str) -> Iterator[tuple[int, StorePath]]:
    for path in list_folder(root / folder, "*.parquet"):
        number = path.name.removesuffix(".parquet")
        if number.isdecimal() and f"{int(number):05d}" == number:
            yield int(number), path


def unfold_parts(store: Store, file: str) -> None:
    """Write the parts of a folded file, whose footer may be damaged, as files of their own where there are none, and
    delete it. What cannot be decoded is lost. Raises CorruptStoreError if it cannot be read; StoreError if the store
    cannot be written."""
    for data in split_parts(read_file(store.root / file)):
        with suppress(OSError, pa.ArrowException, IndexError, KeyError):
            shard = decode_part(data)["row"][0].as_py() // store.record.rows_per_shard
            if folded_parts(shard) == file and not is_there(store.root / sample_part(shard)):
                write_atomically(store.root / sample_part(shard), data)
    remove_file(store.root / file)


class PartFiles:
    """Files of the sample table as they were when it was made: shards with a part of their own, which hides a folded
    one, and the folded files by number. Raises CorruptStoreError if a folded file cannot be read; as `list_folder`."""

    def __init__(self, root: StorePath) -> None:
        # Those of single shards first: what is folded in between is then in both.
        self.loose = {number for number, _ in _numbered(root, "samples")}
        paths = dict(_numbered(root, "samples/folded"))
        self.folded = dict(zip(paths, in_parallel(read_folded_parts, paths.values(), root), strict=True))

    def __contains__(self, shard: int) -> bool:
        return shard in self.loose or self.place(shard) is not None

    def place(self, shard: int) -> PartPlace | None:
        """Return where the folded part of a shard lies."""
        file = self.folded.get(shard // FOLDED_PARTS)
        return file.places.get(shard) if file else None

    def counted(self) -> dict[int, dict[str, dict[str, int]]]:
        """Return counts of rows by status and reason, of folded files that have them, are whole, and hide nothing."""
        whole = [item for item in self.folded.items() if len(item[1].places) == FOLDED_PARTS]
        return {number: file.counts for number, file in whole if file.counts and self.loose.isdisjoint(file.places)}


def sample_dataset(store: Store, leave_out: Collection[int] = ()) -> pads.Dataset:
    """Return the whole sample table, one row per grid row in order; `leave_out`: numbers of folded files. Absent rows
    (between the end of a corpus and the shard boundary where the next one begins) are in no file: they follow from the
    record. Raises CorruptStoreError if a part is missing."""
    schema, parts = sample_schema(store.record.labels), pads.ParquetFileFormat()
    files, children = PartFiles(store.root), []
    spans = store.record.spans()
    for span in spans:
        wanted = [shard for shard in span.shards if shard // FOLDED_PARTS not in leave_out]
        name = {shard: (sample_part if shard in files.loose else folded_parts)(shard) for shard in wanted}
        found: list[tuple[StorePath, list[int] | None]] = []
        for file, some in groupby(wanted, name.__getitem__):
            shards = list(some)
            places = [files.place(shard) for shard in shards] if shards[0] not in files.loose else []
            if None in places:
                lost = store.root / sample_part(shards[places.index(None)])
                raise _unreadable(store.root, FileNotFoundError(f"{lost} is missing or no file"))
            found.append((store.root / file, [place.group for place in places if place] or None))
        try:
            children.append(pads.FileSystemDataset(_fragments(store.root, found, parts), schema, parts))
        except OSError as error:
            raise _unreadable(store.root, error) from error
        gap = range(span.rows.stop, span.shards.stop * store.record.rows_per_shard)
        if gap and span is not spans[-1]:
            children.append(pads.dataset(_absent_rows(gap, schema)))
    return children[0] if len(children) == 1 else pads.dataset(children)


def _fragments(
    root: StorePath, found: Sequence[tuple[StorePath, list[int] | None]], parts: pads.ParquetFileFormat
) -> list[pads.Fragment]:
    paths, groups = [path for path, _ in found], [group for _, group in found]
    if isinstance(root, RemotePath):
        # Whole objects: a Python file system read from Arrow's threads can abort the interpreter at exit.
        sources = in_parallel(lambda path: pa.py_buffer(path.read_bytes()), paths, root)
        return [parts.make_fragment(source, row_groups=some) for source, some in zip(sources, groups, strict=True)]
    if bad := next((path for path in paths if not path.is_file()), None):
        raise FileNotFoundError(f"{bad} is missing or no file")  # Arrow would wait for a pipe
    disk = LocalFileSystem()
    return [parts.make_fragment(str(path), disk, row_groups=some) for path, some in zip(paths, groups, strict=True)]


def shard_table(store: Store, shard: int) -> pa.Table:
    """Return all grid rows of one shard in order, in the columns of the whole store; absent rows too, but for the last
    shard. Raises CorruptStoreError if the sample part cannot be read, or lacks a fixed column."""
    schema, rows = sample_schema(store.record.labels), store.record.shard_rows(shard)
    table = with_labels(read_part(store.root, shard)[0], schema)
    end = min((shard + 1) * store.record.rows_per_shard, store.record.rows)
    return pa.concat_tables([table, _absent_rows(range(rows.stop, end), schema)])


def with_labels(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a sample part in the columns of `schema`; a label that its corpus does not have is null. Raises
    CorruptStoreError for a column of another type."""
    try:
        return pa.concat_tables([schema.empty_table(), table], promote_options="default").select(schema.names)
    except (pa.ArrowException, KeyError) as error:
        raise CorruptStoreError(f"a sample part has other columns than the store: {error}") from error


def in_rows(rows: range) -> pads.Expression:
    """Filter for a range of grid rows; whole parts outside it are not read."""
    return (pads.field("row") >= rows.start) & (pads.field("row") < rows.stop)


def value_codes(columns: Iterable[pa.ChunkedArray]) -> tuple[list[Any], NDArray[np.int32]]:
    """Return the different values of a column that comes in pieces, in order of appearance, and the place of each row's
    among them, int32 (N,); their number for null."""
    places: dict[Any, int] = {}
    codes = [np.empty(0, dtype=np.int32)]
    for column in columns:
        encoded = column.combine_chunks().dictionary_encode()
        own = [places.setdefault(value, len(places)) for value in encoded.dictionary.to_pylist()]
        codes.append(np.array([*own, -1], dtype=np.int32)[encoded.indices.fill_null(len(own)).to_numpy()])
    found = np.concatenate(codes)
    found[found < 0] = len(places)
    return list(places), found


def _absent_rows(rows: range, schema: pa.Schema) -> pa.Table:
    known = {"row": rows, "key": [""] * len(rows), "status": ["absent"] * len(rows)}
    columns = [pa.array(known.get(field.name, [None] * len(rows)), field.type) for field in schema]
    return pa.table(columns, schema=schema)


def read_samples(root: StorePath, dataset: pads.Dataset, **scan: Any) -> pa.Table:
    """Scan `dataset` of `root` as its `to_table` does. Raises CorruptStoreError if a part is missing or damaged."""
    try:
        return dataset.to_table(**scan)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(root, error) from error


def count_samples(store: Store) -> dict[str, dict[str, int]]:
    """Count rows by `status` and by `reason`, the most first. Raises CorruptStoreError as `read_samples`."""
    folded = PartFiles(store.root).counted()
    rest = read_samples(store.root, sample_dataset(store, folded), columns=["status", "reason"])
    found = {}
    for name in rest.column_names:
        counts = Counter({one["values"]: one["counts"] for one in rest[name].drop_null().value_counts().to_pylist()})
        for file in folded.values():
            counts.update(file[name])
        found[name] = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    return found


def _unreadable(root: StorePath, error: Exception) -> CorruptStoreError:
    reason = " ".join(str(error).split())
    return CorruptStoreError(
        f"the sample table of {root} cannot be read: {reason}; `mmkd store verify {root}` names the file"
    )


def with_columns(table: pa.Table, columns: dict[str, list[Any]]) -> pa.Table:
    """Replace columns by name, keeping order and types."""
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        field = table.schema.field(index)
        table = table.set_column(index, field, pa.array(values, type=field.type))
    return table
