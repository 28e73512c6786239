"""Chosen rows of one store, or of several over disjoint corpora, as a new store."""

import hashlib
import json
import posixpath
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from mmkd.base.conditions import parse_condition
from mmkd.base.errors import TeacherMismatchError, UserError
from mmkd.base.places.remote import StorePath, as_root
from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features, part_slices
from mmkd.store.convert.losses import refuse_linked, refuse_losses, store_losses
from mmkd.store.layout import TOWERS, Encoding
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import in_rows
from mmkd.store.selections import read_selection


class StoreRows:
    """A `FeatureSource` of stores, each with the rows to take, int64 (n,), in order. `teachers`: slugs to keep; None:
    all, which every store must have. `allow_loss`: kinds of `mmkd.store.convert.losses`. Raises UserError for a missing
    teacher or another loss; TeacherMismatchError for one name with two digests."""

    kind = "rows"
    has_status = True
    towers = TOWERS

    def __init__(
        self,
        parts: Sequence[tuple[FeatureStore, NDArray[np.int64]]],
        teachers: Sequence[str] | None = None,
        *,
        allow_loss: Collection[str] = (),
    ) -> None:
        self.parts = parts
        first = parts[0][0]
        self._slugs = tuple(first.teachers) if teachers is None else tuple(teachers)
        for store, _ in parts:
            if teachers is None and (other := sorted(store.teachers.keys() - set(self._slugs))):
                raise UserError(
                    f"{store.root} has {', '.join(other)}, {first.root} has not; name the teachers to keep with "
                    f"--teachers {','.join(slug for slug in self._slugs if slug in store.teachers) or 'NAMES'}"
                )
            for slug in self._slugs:
                if store.card(slug).digest != first.card(slug).digest:
                    raise TeacherMismatchError(
                        f"{slug} has digest {first.card(slug).digest} in {first.root} and {store.card(slug).digest} "
                        f"in {store.root}; features of different teachers are not mixed under one name"
                    )
        for store, rows in parts:
            refuse_linked("the new store", store, rows)
        losses = (loss for store, rows in parts for loss in store_losses(store, rows, self._slugs))
        refuse_losses("the new store", losses, allow_loss)
        self.root = _common_root({span.corpus.root for store, _ in parts for span in store.record.spans()})
        self.labels = tuple(dict.fromkeys(label for store, _ in parts for label in store.record.labels))

    def digest(self) -> str:
        """Cover corpora, rows, teachers and ledger entries: a source that was extracted further is another one."""
        content = hashlib.sha256(json.dumps(self._slugs).encode())
        for store, rows in self.parts:
            corpora = "".join(span.corpus.digest for span in store.record.spans())
            content.update(corpora.encode() + rows.astype("<i8").tobytes())
            for shard in np.unique(rows // store.record.rows_per_shard).tolist():
                entries = (store.ledger.get((shard, slug)) for slug in self._slugs)
                content.update("".join(entry.model_dump_json() for entry in entries if entry).encode())
        return content.hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        for store, rows in self.parts:
            for table in _sample_rows(store, rows):
                for row in table.to_pylist():
                    root = store.record.image_root(row.pop("row"))
                    if row["uri"] is not None and root != str(self.root):
                        row["uri"] = posixpath.join(root, row["uri"]).removeprefix(f"{str(self.root).rstrip('/')}/")
                    yield row

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """Return the first store's cards; without an encoding they keep their own."""
        cards = [self.parts[0][0].card(slug) for slug in self._slugs]
        return [card.with_encoding(encoding or card.encoding) for card in cards]

    def features(self, rows: pa.Table, cards: Sequence[TeacherCard]) -> tuple[Features, list[str | None]]:
        slices = list(part_slices(rows, (len(taken) for _, taken in self.parts)))
        out: Features = {}
        for slug, tower in ((card.slug, tower) for card in cards for tower in card.towers):
            pieces = [self.parts[i][0].features(slug, tower)[self.parts[i][1][part]] for i, part, _ in slices]
            out[slug, tower] = np.concatenate(pieces)
        return out, [None] * len(rows)


def _common_root(roots: set[str]) -> StorePath:
    """Return the deepest folder that all roots share. Raises UserError for disk and URL, or several buckets."""
    if len(roots) == 1:
        return as_root(roots.pop())
    origins = {"/".join(root.split("/")[:3]) if "://" in root else "/" for root in roots}
    if len(origins) > 1:
        raise UserError(
            f"images lie below {' and '.join(sorted(origins))}, a store has one place for them; "
            "bring them together and note it with `mmkd store relocate` first"
        )
    origin = origins.pop().rstrip("/")
    shared = posixpath.commonpath([f"/{root.removeprefix(origin).strip('/')}" for root in roots])
    return as_root((origin + shared).rstrip("/") or "/")


def check_target(stores: Iterable[FeatureStore], out: StorePath) -> None:
    """Rows go into a new store. Raises UserError if `out` is one of the stores that they come from."""
    if out.resolve() in [store.root.resolve() for store in stores]:
        raise UserError(f"{out} is a store that rows are taken from; name a new folder, a store is not cut in place")


def _sample_rows(store: FeatureStore, rows: NDArray[np.int64]) -> Iterator[pa.Table]:
    """Yield sample rows in the order of `rows`; ascending ones shard by shard, so that memory stays flat."""
    if (np.diff(rows) < 0).any():
        table = store.sample_table(filter=pads.field("row").isin(pa.array(rows)))
        yield table.take(pa.array(np.searchsorted(table["row"].to_numpy(), rows)))
        return
    shards = rows // store.record.rows_per_shard
    for shard in np.unique(shards).tolist():
        span = store.record.shard_rows(shard)
        yield store.sample_table(filter=in_rows(span)).take(pa.array(rows[shards == shard] - span.start))


def chosen_rows(
    store: FeatureStore, keys: Sequence[str] | None = None, where: str | None = None, selection: str | None = None
) -> NDArray[np.int64]:
    """Return the rows that satisfy all conditions, int64 (n,), in the order of `keys`, else in grid order. `where`: as
    in SQL (`mmkd.base.conditions`); `selection`: one that keeps any teacher for the row. Raises UserError for a key,
    column or selection that the store lacks, or if no row is left; ConfigError for a condition that cannot be read."""
    keep: pads.Expression = pads.field("status") != "absent"
    if where is not None:
        keep &= parse_condition(where, store.samples.schema)
    columns = ["row"]
    if keys is not None:
        # In the scan, part by part: memory follows the keys that are wanted, not those that the store has.
        keep &= pads.field("key").isin(pa.array(dict.fromkeys(keys), pa.string()))
        columns += ["key", "status"]
    table = store.sample_table(columns, keep)
    if selection is not None:
        chosen = np.asarray(read_selection(store, selection).kept.any(axis=1))
        table = table.filter(pa.array(chosen[table["row"].to_numpy()]))
    rows = table["row"].to_numpy()
    if keys is not None:
        # Of equal keys one row at most is not failed: it goes before the others, which go in grid order.
        live = pc.not_equal(table["status"], "failed").to_pylist()
        named = sorted(zip(live, [-row for row in rows.tolist()], table["key"].to_pylist(), strict=True))
        place = {key: -row for _, row, key in named}
        lost = [key for key in keys if key not in place]
        if lost and where is None and selection is None:
            raise UserError(f"{store.root} has no key {lost[0]!r} ({len(lost)} of {len(keys)} keys are not in it)")
        rows = np.array([place[key] for key in dict.fromkeys(keys) if key in place], dtype=np.int64)
    if not len(rows):
        raise UserError(f"no row of {store.root} fits; `mmkd store info {store.root}` shows what it holds")
    return np.asarray(rows, dtype=np.int64)
