"""Chosen rows of one store, or of several over disjoint corpora, as a new store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkd.store.card import TeacherCard
from mmkd.store.convert.importing import Features
from mmkd.store.encoding import Encoding
from mmkd.store.errors import TeacherMismatchError, UserError
from mmkd.store.layout import TOWERS
from mmkd.store.reader import FeatureStore


class StoreRows:
    """Rows of stores in the order given, with the teachers that all of them have. A `FeatureSource`.

    Args:
        parts: stores, each with the rows to take, int64 (n,).
        teachers: slugs to keep; all that the first store has when None.

    Raises:
        UserError: a teacher that a store lacks.
        TeacherMismatchError: one name, two digests.
    """

    kind = "rows"

    def __init__(
        self, parts: Sequence[tuple[FeatureStore, NDArray[np.int64]]], teachers: Sequence[str] | None = None
    ) -> None:
        self.parts = parts
        first = parts[0][0]
        self._slugs = tuple(first.teachers) if teachers is None else tuple(teachers)
        for store, _ in parts:
            for slug in self._slugs:
                if store.card(slug).digest != first.card(slug).digest:
                    raise TeacherMismatchError(
                        f"{slug} has digest {first.card(slug).digest} in {first.root} and {store.card(slug).digest} "
                        f"in {store.root}; features of different teachers are not mixed under one name"
                    )
        roots = {store.record.corpus.root for store, _ in parts}
        # Sources with different roots keep their images under absolute names.
        self.root = Path(roots.pop()) if len(roots) == 1 else Path("/")
        self.labels = tuple(dict.fromkeys(label for store, _ in parts for label in store.record.corpus.labels))

    def digest(self) -> str:
        """Over the sources' corpora, the rows taken and the teachers."""
        content = hashlib.sha256(json.dumps(self._slugs).encode())
        for store, rows in self.parts:
            content.update(store.record.corpus.digest.encode() + rows.astype("<i8").tobytes())
        return content.hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The sample rows with what is known of them; their numbers are given anew."""
        for store, rows in self.parts:
            table = store.sample_table().take(pa.array(rows)).drop_columns(["row"])
            for batch in table.to_batches(max_chunksize=4096):
                for row in batch.to_pylist():
                    if row["uri"] is not None and str(self.root) != store.record.corpus.root:
                        row["uri"] = str(Path(store.record.corpus.root) / row["uri"]).lstrip("/")
                    yield row

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """The first store's cards; without an encoding they keep their own."""
        cards = [self.parts[0][0].card(slug) for slug in self._slugs]
        return [card.with_encoding(encoding or card.encoding) for card in cards]

    def features(self, rows: pa.Table, cards: Iterable[TeacherCard]) -> tuple[Features, list[str | None]]:
        """Gather the features of a range of the new rows."""
        numbers = rows["row"].to_pylist()
        first, end = numbers[0], numbers[-1] + 1
        out: Features = {}
        for card in cards:
            for tower in TOWERS:
                pieces = []
                start = 0
                for store, taken in self.parts:
                    piece = taken[max(first - start, 0) : max(end - start, 0)]
                    pieces.append(getattr(store, tower)(card.slug)[piece])
                    start += len(taken)
                out[card.slug, tower] = np.concatenate(pieces)
        return out, [None] * len(rows)


def chosen_rows(store: FeatureStore, keys: Sequence[str] | None, where: Sequence[tuple[str, str]]) -> NDArray[np.int64]:
    """Rows by key (in the order of `keys`) and by equal column values; grid order without `keys`.

    Raises:
        UserError: a key or a column that the store does not have, or no row is left.
    """
    table = store.sample_table(["row", "key", *dict.fromkeys(column for column, _ in where)])
    for column, value in where:
        table = table.filter(pc.equal(pc.cast(table[column], pa.string()), value))
    rows = table["row"].to_numpy()
    if keys is not None:
        place = dict(zip(table["key"].to_pylist(), rows.tolist(), strict=True))
        lost = [key for key in keys if key not in place]
        if lost and not where:
            raise UserError(f"{store.root} has no key {lost[0]!r} ({len(lost)} of {len(keys)} keys are not in it)")
        rows = np.array([place[key] for key in dict.fromkeys(keys) if key in place], dtype=np.int64)
    if not len(rows):
        raise UserError(f"no row of {store.root} fits; `mmkd store info {store.root}` shows what it holds")
    chosen: NDArray[np.int64] = rows.astype(np.int64)
    return chosen
