"""A further corpus below the rows that are there: new parts, then the record, then array documents of the new length.

No feature of the old rows is touched; their sample parts are rewritten only to add labels that the new corpus brings.
The new corpus begins at the next shard boundary, so that no chunk holds rows of two corpora; grid rows in between are
absent.
"""

from __future__ import annotations

import pyarrow as pa

from mmkd.base.errors import StoreError
from mmkd.base.files import write_atomically
from mmkd.base.places.remote import StorePath
from mmkd.store.card import read_card, teacher_folders
from mmkd.store.hierarchy import encode_document, group_document, write_document
from mmkd.store.layout import sample_part, shard_count
from mmkd.store.ledger import entries_of_shard, write_entry
from mmkd.store.record import CorpusRecord, StoreRecord, read_record
from mmkd.store.samples import encode_part, read_part, sample_schema, with_labels, write_part
from mmkd.store.writer import array_documents


def append_rows(root: StorePath, record: StoreRecord, corpus: CorpusRecord, index: pa.Table) -> StoreRecord:
    """Lengthen a store by the rows of another corpus.

    Args:
        root: the store.
        record: its record as the caller read it.
        corpus: what the new rows come from.
        index: its inputs with the columns of `sample_schema(corpus.labels)`; `row` begins at `first_new_row(record)`.

    Labels that only one side has become null columns of the other, so that all parts have one schema.

    Raises:
        StoreError: the store cannot be written, or another process changed it meanwhile.
        ValueError: more shards than a store may have.
    """
    first = first_new_row(record)
    content = record.model_dump() | {"rows": first + corpus.rows, "appended": (*record.appended, corpus)}
    longer = StoreRecord.model_validate(content)
    per_shard = record.rows_per_shard
    schema = sample_schema(longer.labels)
    _refuse_other(root, record)  # another's new rows may stand where ours would be written
    for shard in longer.spans()[-1].shards:
        part = index.slice(shard * per_shard - first, per_shard)
        write_part(root, shard, with_labels(part, schema).cast(schema).combine_chunks())
    _refuse_other(root, record)
    # From here on the rows belong to the store; until here the new parts are files that nobody looks at.
    write_document(root / "zarr.json", group_document(longer.model_dump(mode="json")))
    finish_append(root, longer)
    return longer


def _refuse_other(root: StorePath, record: StoreRecord) -> None:
    if read_record(root) != record:
        raise StoreError(f"{root} was changed by another process meanwhile; nothing was appended, run it again")


def first_new_row(record: StoreRecord) -> int:
    """Grid row at which another corpus would begin: the next shard boundary."""
    return shard_count(record.rows, record.rows_per_shard) * record.rows_per_shard


def finish_append(root: StorePath, record: StoreRecord) -> None:
    """Bring older sample parts and array documents to the record, as after an interrupted `append_rows`."""
    schema = sample_schema(record.labels)
    for shard in range(shard_count(record.rows, record.rows_per_shard)):
        if not (root / sample_part(shard)).is_file():
            continue  # dropped by a repair: the next extraction lists it again
        table, _ = read_part(root, shard)
        if table.schema.equals(schema):
            continue
        # Entries before the part, whose bytes are known by then: after a kill the same is done again.
        data, sha256 = encode_part(with_labels(table, schema).combine_chunks())
        for entry in entries_of_shard(root, shard).values():
            write_entry(root, entry.model_copy(update={"samples_sha256": sha256}))
        write_atomically(root / sample_part(shard), data)
    for slug in teacher_folders(root):
        card = read_card(root, slug)
        for name, document in array_documents(record, card) if card is not None else ():
            path = root / name
            if not path.is_file() or path.read_bytes() != encode_document(document):
                write_document(path, document)
