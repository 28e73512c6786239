"""Features that others made, into a store: rows first, then shard by shard, so that it can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.store.atomic import disk_errors
from mmkd.store.card import Encoding, Preprocessing, TeacherCard
from mmkd.store.errors import CorpusError
from mmkd.store.layout import IMAGE_SOUND, TEXT_SOUND, TOWERS
from mmkd.store.reader import FeatureStore
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema, with_columns, write_part
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, write_shard

_BATCH = 65536

Features = dict[tuple[str, str], NDArray[np.floating[Any]]]
"""(slug, tower) to float (rows, D), NaN where missing."""


class FeatureSource(Protocol):
    """Features in another layout."""

    @property
    def kind(self) -> str:
        """Name of the layout."""

    @property
    def root(self) -> Path:
        """Folder that every row's `uri` is relative to."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns beside the fixed ones."""

    def digest(self) -> str:
        """Changes when the index of the source does."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Sample rows in order: `key`, `caption`, `uri` and labels."""

    def cards(self, encoding: Encoding) -> list[TeacherCard]:
        """Every teacher in it."""

    def features(self, rows: pa.Table, cards: Iterable[TeacherCard]) -> tuple[Features, list[str | None]]:
        """Features of these rows, and for each row why it has none, or None."""


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    rows: int
    shards: int
    """Shards that this run wrote; those that were there before are not counted."""
    failed: int
    """Rows of them without any feature."""


def imported_card(slug: str, source: str, dim: int, encoding: Encoding) -> TeacherCard:
    """A card for features whose maker is known by name only: what nobody stated is marked so."""
    return TeacherCard(
        slug=slug,
        source=source,
        weights_sha256=f"not stated: {source}",
        preprocessing=Preprocessing(image_size=(0, 0), mean=(), std=(), interpolation="", resize_mode=""),
        tokenizer_sha256="not stated",
        context_length=0,
        dim=dim,
        encoding=encoding,
        loader="imported",
    )


def import_features(
    source: FeatureSource, root: Path, encoding: Encoding, progress: Callable[[int, int], None]
) -> ImportReport:
    """Bring `source` into a store at `root`; running it again does what is left.

    A value that does not fit the encoding (beyond 65504 in float16) makes its row missing, never infinite.

    Args:
        source: the features.
        root: a new folder, or one that this function was interrupted in.
        encoding: `float32` keeps float32 sources exactly; `float16` rounds to nearest even.
        progress: called with shards done and shards in all.

    Raises:
        CorpusError: the source is empty, damaged, or not the one that the store was begun with.
        StoreError: the store cannot be written, or holds other features.
    """
    if not (root / "zarr.json").is_file():
        _create(source, root)
    store = FeatureStore.open(root)
    record = store.record
    if (record.corpus.kind, record.corpus.digest) != (source.kind, source.digest()):
        raise CorpusError(
            f"{root} was made from {record.corpus.location}, which {source.root} is not; name a new store"
        )
    cards = source.cards(encoding)
    for card in cards:
        add_teacher(root, record, card)
    written = failed = 0
    shards = record.spans()[0].shards  # what was appended later is not this source's business
    for shard in shards:
        lacking = [card for card in cards if (shard, card.slug) not in store.ledger]
        if lacking:
            failed += _import_shard(source, root, store, shard, lacking)
            written += 1
        progress(shard + 1, len(shards))
    return ImportReport(record.rows, written, failed)


def _import_shard(source: FeatureSource, root: Path, store: FeatureStore, shard: int, cards: list[TeacherCard]) -> int:
    table, sha = read_part(root, shard)
    features, reasons = source.features(table, cards)
    if "pending" in table["status"].to_pylist():
        status = ["ok" if reason is None else "failed" for reason in reasons]
        sha = write_part(root, shard, with_columns(table, {"status": status, "reason": reasons}))
    for card in cards:
        values = {tower: _stored(features[card.slug, tower], card.encoding) for tower in TOWERS}
        valid = np.zeros(len(table), dtype=np.uint8)
        for tower, bit in zip(TOWERS, (IMAGE_SOUND, TEXT_SOUND), strict=True):
            norms = np.linalg.norm(values[tower].astype(np.float64), axis=1)
            valid[np.isfinite(norms) & (norms > 0)] |= bit
        write_shard(root, store.record, card, shard, ShardFeatures(values["image"], values["text"], valid), sha)
    return sum(reason is not None for reason in reasons)


def _stored(values: NDArray[np.floating[Any]], encoding: Encoding) -> NDArray[np.floating[Any]]:
    with np.errstate(over="ignore"):
        return values.astype(encoding)


def _create(source: FeatureSource, root: Path) -> None:
    schema = sample_schema(source.labels)
    with _spooled(source.rows(), schema) as index:
        if not len(index):
            raise CorpusError(f"{source.root} holds no rows")
        corpus = CorpusRecord(
            kind=source.kind,
            location=str(source.root),
            root=str(source.root.resolve()),
            rows=len(index),
            labels=source.labels,
            digest=source.digest(),
        )
        create_store(root, corpus, index)


@contextmanager
def _spooled(rows: Iterator[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as a table mapped from a temporary file, numbered and pending; memory stays flat."""
    with TemporaryDirectory(prefix="mmkd-import-") as folder:
        spool = Path(folder) / "index.arrow"
        seen: dict[str, int] = {}
        with disk_errors(spool), pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            numbered = (_row(number, row, seen) for number, row in enumerate(rows))
            while batch := list(islice(numbered, _BATCH)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        with pa.memory_map(str(spool)) as mapped:
            yield pa.ipc.open_stream(mapped).read_all()


def _row(number: int, row: Mapping[str, Any], seen: dict[str, int]) -> dict[str, Any]:
    first = seen.setdefault(row["key"], number)
    if first != number:
        raise CorpusError(
            f"key {row['key']!r} names rows {first} and {number}; make the keys distinct and import again"
        )
    return {"row": number, "status": "pending"} | dict(row)
