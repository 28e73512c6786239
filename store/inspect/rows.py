"""Lookup of rows by key, row or shard, and of their samples."""

import difflib
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from mmkd.base.arrays import Ints
from mmkd.base.errors import UserError
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import shard_table

_COMPARED_KEYS = 20_000
"""Keys that a misspelled one is compared with letter by letter; more would take seconds."""
_PARTS_READ_WHOLE = 8
"""Rows in at most this many shards are read shard by shard, without a pass over the whole table."""


def find_row(store: FeatureStore, what: str) -> int:
    """Return the row that a user means: a key first, then a number; `row:12` is a number. Raises UserError if none."""
    number = what.removeprefix("row:")
    if not what.startswith("row:"):
        same_key = (pads.field("key") == what) & (pads.field("status") != "absent")  # absent rows have the key ''
        if found := store.sample_table(["row"], same_key)["row"].to_pylist():
            return int(found[0])
    if re.fullmatch(r"\d{1,18}", number):
        if int(number) < len(store):
            return int(number)
        raise UserError(f"{store.root} has no row {number}; its rows are 0 to {len(store) - 1}")
    near = near_keys(store, what)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "give a key, a row number or shard:NUMBER"
    raise UserError(f"{store.root} has no key {what!r}; {hint}")


def find_shard(store: FeatureStore, what: str) -> int | None:
    """Return the shard of `shard:117`; None for something else. Raises UserError if there is no such shard."""
    if not what.startswith("shard:"):
        return None
    number = what.removeprefix("shard:")
    if not re.fullmatch(r"\d{1,9}", number) or int(number) >= store.shards:
        raise UserError(f"{store.root} has no shard {number!r}; its shards are 0 to {store.shards - 1}")
    return int(number)


def near_keys(store: FeatureStore, key: str, most: int = 3) -> list[str]:
    """Return keys that hold `key`, or else those spelled most like it; among very many keys only some are compared."""
    keys = store.sample_table(["key"])["key"]
    holding = keys.filter(pc.match_substring(keys, key, ignore_case=True)) if key else keys.slice(0, 0)
    if len(holding):
        return [str(found) for found in holding.slice(0, most).to_pylist()]
    alike = keys.filter(pc.less_equal(pc.abs(pc.subtract(pc.utf8_length(keys), len(key))), 2))
    return difflib.get_close_matches(key, alike.slice(0, _COMPARED_KEYS).to_pylist(), n=most)


def sample_rows(store: FeatureStore, rows: Sequence[int] | Ints) -> pa.Table:
    """Return the sample rows of these grid rows, in this order. Raises CorruptStoreError if a part is unreadable."""
    wanted = np.asarray(rows, dtype=np.int64)
    per_shard = store.record.rows_per_shard
    shards = np.unique(wanted // per_shard)
    if len(shards) > _PARTS_READ_WHOLE:
        return store.sample_table().take(pa.array(wanted))
    # Whole shards, absent rows included, so that a row's place follows from its number.
    parts = [shard_table(store, int(shard)) for shard in shards]
    place = np.searchsorted(shards, wanted // per_shard) * per_shard + wanted % per_shard
    table = pa.concat_tables(parts) if parts else store.samples.schema.empty_table()
    return table.take(pa.array(place, pa.int64()))
