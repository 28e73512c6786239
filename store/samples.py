"""The sample table: one Parquet row for every corpus input, failed ones too. Written when the corpus is indexed (status
`pending`), and again by shard when the inputs have been read. Further columns are the corpus' labels."""

import hashlib
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import write_atomically
from mmkd.base.places.remote import RemotePath, StorePath, in_parallel
from mmkd.store.hierarchy import read_file
from mmkd.store.layout import sample_part
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


def read_part(root: StorePath, shard: int) -> tuple[pa.Table, str]:
    """Read one shard's rows and the SHA-256 of their file. Raises CorruptStoreError if it is missing or damaged."""
    path = root / sample_part(shard)
    try:
        data = read_file(path)
        return decode_part(data), hashlib.sha256(data).hexdigest()
    except (OSError, CorruptStoreError, pa.ArrowException) as error:
        raise CorruptStoreError(f"sample part {path} cannot be read: {error}") from error


def sample_dataset(store: Store) -> pads.Dataset:
    """Return the whole sample table, one row per grid row in order. Absent rows (between the end of a corpus and the
    shard boundary where the next one begins) are in no file: they follow from the record."""
    schema = sample_schema(store.record.labels)
    children: list[pads.Dataset] = []
    spans = store.record.spans()
    for span in spans:
        paths = [store.root / sample_part(shard) for shard in span.shards]
        try:
            if isinstance(store.root, RemotePath):
                # Whole objects: a Python file system read from Arrow's threads can abort the interpreter at exit.
                parts = pads.ParquetFileFormat()
                buffers = in_parallel(lambda path: pa.py_buffer(path.read_bytes()), paths, store.root)
                fragments = [parts.make_fragment(buffer) for buffer in buffers]
                children.append(pads.FileSystemDataset(fragments, schema, parts))
            else:
                if bad := next((path for path in paths if not path.is_file()), None):
                    raise FileNotFoundError(f"{bad} is missing or no file")  # Arrow would wait for a pipe
                children.append(pads.dataset([str(path) for path in paths], schema=schema, format="parquet"))
        except OSError as error:  # Arrow looks for the files at once
            raise _unreadable(store.root, error) from error
        gap = range(span.rows.stop, span.shards.stop * store.record.rows_per_shard)
        if gap and span is not spans[-1]:
            children.append(pads.dataset(_absent_rows(gap, schema)))
    return children[0] if len(children) == 1 else pads.dataset(children)


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
