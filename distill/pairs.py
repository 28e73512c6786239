"""Selected rows of a store with their caption numbers and image sources."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkd.base.conditions import parse_condition
from mmkd.base.errors import IncompleteStoreError, UserError
from mmkd.store import FeatureStore

_COLUMNS = ["row", "caption", "uri", "offset", "length", "status", "image_sha256"]


@dataclass(frozen=True)
class Pairs:
    """Rows with a sound image and a sound caption. rows: int64 (n,) grid rows, ascending. caption: int64 (n,), number
    of each row's caption: equal captions have equal numbers. image: int64 (n,), number of each row's image, equal for
    equal bytes. captions: the distinct captions by number. table: the sample rows, in the order of `rows`."""

    rows: NDArray[np.int64]
    caption: NDArray[np.int64]
    image: NDArray[np.int64]
    captions: pa.LargeStringArray
    table: pa.Table

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index in `rows` of each of these grid rows."""
        return np.searchsorted(self.rows, rows)


def rows_where(store: FeatureStore, where: str, columns: list[str]) -> pa.Table:
    """Return sample rows that match a condition as after SQL's WHERE; all rows when it is empty. Raises ConfigError if
    it cannot be read, or names a column that the store does not have."""
    condition = parse_condition(where, store.samples.schema) if where else None
    return store.sample_table(columns=columns, filter=condition)


def find_pairs(store: FeatureStore, where: str, wanted: NDArray[np.bool_] | None = None) -> Pairs:
    """Return the sound pairs among the rows that match `where` (see `rows_where`) and are `wanted`, bool (N,), None for
    all. Raises IncompleteStoreError if rows that match have not been extracted yet."""
    table = rows_where(store, where, _COLUMNS)
    pending = int(pc.sum(pc.equal(table["status"], "pending")).as_py() or 0)
    if pending:
        raise IncompleteStoreError(
            f"{store.root}: {pending} of {len(table)} matching rows are not extracted yet; finish `mmkd extract` first"
        )
    usable = pc.and_(pc.equal(table["status"], "ok"), pc.and_(table["uri"].is_valid(), table["caption"].is_valid()))
    if wanted is not None:
        usable = pc.and_(usable, pa.array(wanted[table["row"].to_numpy()]))
    table = table.filter(usable)
    # An Arrow string column ends at 2 GB in one piece: four million captions of usual length.
    encoded = table["caption"].cast(pa.large_string()).combine_chunks().dictionary_encode()
    hashes = table["image_sha256"].combine_chunks().dictionary_encode()
    image = hashes.indices.fill_null(-1).to_numpy().astype(np.int64)
    pairs = Pairs(
        table["row"].to_numpy(),
        encoded.indices.to_numpy().astype(np.int64),
        np.where(image < 0, len(image) + np.arange(len(image)), image),  # a row without a hash is alone
        encoded.dictionary,
        table.select(["uri", "offset", "length"]).combine_chunks(),
    )
    # Arrow's pool keeps what reading and filtering took: 1.4 of 2.0 GB of 2.9 million pairs, as long as the run lasts.
    del table, encoded, hashes, usable
    pa.default_memory_pool().release_unused()
    return pairs


def training_pairs(store: FeatureStore, where: str, wanted: NDArray[np.bool_] | None, batch_size: int) -> Pairs:
    """Return the pairs to train on. Raises UserError if they are fewer than a batch; otherwise as `find_pairs`."""
    pairs = find_pairs(store, where, wanted)
    if len(pairs.rows) < batch_size:
        having = "" if wanted is None else " and have a teacher"
        raise UserError(
            f"{store.root}: {len(pairs.rows)} rows match {where or 'everything'}{having}, "
            f"fewer than one batch of {batch_size}; lower batch_size or change `where`"
        )
    return pairs
