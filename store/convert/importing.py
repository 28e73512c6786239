"""Import features made by other tools: rows first, then shard by shard, so that it can be interrupted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.duplicates import find_duplicates, key_hash
from mmkd.base.errors import CorpusError, UserError
from mmkd.base.files import disk_errors
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath, as_root
from mmkd.store.card import Preprocessing, TeacherCard
from mmkd.store.encoding import encode_rows, value_type
from mmkd.store.fold import fold
from mmkd.store.layout import PAIR_SOUND, TOWERS, Encoding, Tower
from mmkd.store.reader import FeatureStore
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema, with_columns, write_part
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, note_encoding_error, write_shard

_BATCH = 65536

NO_FEATURE = "features: missing, not finite, zero, or too large for the encoding"
"""Reason of a row for which a source without `status` has no feature that can be stored; after `image ` or `text ` of
one that lacks the feature of a tower."""

Features = dict[tuple[str, str], NDArray[np.floating[Any]]]
"""(slug, tower) to float (rows, D), NaN where missing."""


class FeatureSource(Protocol):
    """Features in another layout, `kind`. Every row's `uri` is relative to `root`; `labels` are the columns beside the
    fixed ones; `digest` changes when the index does. With `has_status`, `rows` gives `status` and `reason`; else a row
    that lacks one of `towers` (the text only if it has a caption) is partial, or failed without any feature."""

    kind: str

    @property
    def root(self) -> Path | StorePath: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def has_status(self) -> bool: ...

    @property
    def towers(self) -> tuple[Tower, ...]: ...

    def digest(self) -> str: ...

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield sample rows in order: `key`, `caption`, `uri`, labels, and further columns of `FIXED_COLUMNS`."""

    def cards(self, encoding: Encoding | None) -> list[TeacherCard]:
        """Return every teacher in it; None: in the source's own encoding, or one that keeps every value."""

    def features(self, rows: pa.Table, cards: Sequence[TeacherCard]) -> tuple[Features, list[str | None]]:
        """Return features of these rows, and for each row why it lacks some, or None."""


@dataclass(frozen=True)
class ImportReport:
    """Rows of the store, shards that this import wrote, and rows of these without any feature."""

    rows: int
    shards: int
    failed: int


def part_slices(rows: pa.Table, sizes: Iterable[int]) -> Iterator[tuple[int, slice, slice]]:
    """Find consecutive `rows` in parts of these sizes, one after another. Yields the number of each part that holds
    some of them, the slice of the part, and its place in `rows`."""
    start, first = 0, rows["row"][0].as_py()
    end = first + len(rows)
    for number, size in enumerate(sizes):
        low, high = max(first, start), min(end, start + size)
        if low < high:
            yield number, slice(low - start, high - start), slice(low - first, high - first)
        start += size


def missing_features(rows: int, cards: Iterable[TeacherCard]) -> Features:
    """Return NaN for all features, for a source to fill in."""
    places = [(card, tower) for card in cards for tower in card.towers]
    shapes = {(card.slug, tower): ((rows, card.dim), value_type(card.encoding)) for card, tower in places}
    return {place: np.full(shape, np.nan, dtype) for place, (shape, dtype) in shapes.items()}


def exact_encoding(place: object, dtype: np.dtype[Any]) -> Encoding:
    """Return the encoding that keeps every value of a float type. Raises UserError for floats of more than 32 bits."""
    if dtype.itemsize > 4:
        raise UserError(f"{place} holds {dtype}, which no encoding of a store keeps; round it: --encoding float32")
    return "float16" if dtype.itemsize == 2 else "float32"


def imported_card(
    slug: str, source: str, dim: int, encoding: Encoding, towers: tuple[Tower, ...] = TOWERS
) -> TeacherCard:
    """Return a card for features whose teacher is known by name only; unknown fields are marked as not stated."""
    unknown = Preprocessing(image_size=(0, 0), mean=(), std=(), interpolation="", resize_mode="")
    return TeacherCard(
        slug=slug,
        source=source,
        weights_sha256=f"not stated: {source}",
        towers=towers,
        preprocessing=unknown if "image" in towers else None,
        tokenizer_sha256="not stated" if "text" in towers else "",
        context_length=0,
        dim=dim,
        encoding=encoding,
        loader="imported",
    )


def import_features(
    source: FeatureSource, root: StorePath, encoding: Encoding | None, progress: Callable[[int, int], None]
) -> ImportReport:
    """Bring `source` into a store at `root`; running it again finishes what is left. `encoding` None: the source's,
    or one that keeps every value. `progress` takes shards done, and all of them. Raises CorpusError if the source is
    empty, damaged, or not that of the store; StoreError if the store cannot be written, or holds other features;
    BusyStoreError."""
    with only_writer(root, "mmkd store import/subset/merge"):
        # Before anything is written: a failed import must not leave a store that blocks the right command.
        cards = source.cards(encoding)
        if not (root / "zarr.json").is_file():
            place = str(source.root)
            with _spool(source.rows(), sample_schema(source.labels)) as index:
                if not len(index):
                    raise CorpusError(f"{place} holds no rows")
                facts: dict[str, Any] = {"kind": source.kind, "labels": source.labels, "digest": source.digest()}
                folder = str(as_root(place).resolve())
                create_store(root, CorpusRecord(location=place, root=folder, rows=len(index), **facts), index)
        store = FeatureStore.open(root)
        record = store.record
        if (record.corpus.kind, record.corpus.digest) != (source.kind, source.digest()):
            raise CorpusError(
                f"{root} was made from other rows or features than {source.root} gives now; name a new store"
            )
        for card in cards:
            add_teacher(store, card)
        written = failed = 0
        shards = record.spans()[0].shards  # what was appended later is not this source's business
        for shard in shards:
            if lacking := [card for card in cards if (shard, card.slug) not in store.ledger]:
                failed += _import_shard(source, store, shard, lacking)
                written += 1
            progress(shard + 1, len(shards))
        for card in cards:
            note_encoding_error(store, card.slug)
        fold(store)
        return ImportReport(record.rows, written, failed)


def _import_shard(source: FeatureSource, store: FeatureStore, shard: int, cards: list[TeacherCard]) -> int:
    table, sha = read_part(store.root, shard)
    features, reasons = source.features(table, cards)
    status = table["status"].to_pylist()
    if not source.has_status:
        status, reasons = _judge_rows(source, table, features, cards, reasons)
        if "pending" in table["status"].to_pylist():
            sha = write_part(store.root, shard, with_columns(table, {"status": status, "reason": reasons}))
    for card in cards:
        # Every row is offered; the writer keeps those that are finite and not zero in this encoding.
        offered = np.full(len(table), PAIR_SOUND, dtype=np.uint8)
        image, text = (features.get((card.slug, tower)) for tower in TOWERS)
        # A card that comes with the cost of its encoding: the features are decoded from it, and cost nothing more.
        write_shard(store, card, shard, ShardFeatures(image, text, offered, card.encoding_error), sha)
    return 0 if source.has_status else status.count("failed")


def _judge_rows(
    source: FeatureSource, table: pa.Table, features: Features, cards: list[TeacherCard], reasons: list[str | None]
) -> tuple[list[str], list[str | None]]:
    """Return status and reason of each row by the features that can be stored; a reason of the source goes first."""
    every = np.ones(len(table), dtype=bool)
    sound = {tower: np.zeros(len(table), dtype=bool) for tower in TOWERS}
    for card in cards:
        for tower in card.towers:
            sound[tower] |= encode_rows(features[card.slug, tower], every, card.encoding)[1]
    expected = {"image": every, "text": table["caption"].is_valid().to_numpy()}
    status: list[str] = []
    whys: list[str | None] = []
    for row, reason in enumerate(reasons):
        lacking = [tower for tower in source.towers if expected[tower][row] and not sound[tower][row]]
        failed = not sound["image"][row] and not sound["text"][row]
        whys.append(reason or (NO_FEATURE if failed else f"{lacking[0]} {NO_FEATURE}" if lacking else None))
        status.append("failed" if failed else "partial" if whys[-1] else "ok")
    return status, whys


@contextmanager
def _spool(rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Give rows as a table mapped from a temporary file, numbered and pending; memory stays flat."""
    with TemporaryDirectory(prefix="mmkd-import-") as folder:
        spool, hashes = Path(folder) / "index.arrow", Path(folder) / "keys"
        with (
            disk_errors(spool),
            hashes.open("wb") as keys,
            pa.OSFile(str(spool), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            numbered = ({"status": "pending"} | row | {"row": number} for number, row in enumerate(rows))
            while batch := list(islice(numbered, _BATCH)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                # A failed row may repeat a key: it is how a store keeps the second of two equal ones.
                names = (f"\0failed {row['row']}" if row["status"] == "failed" else row["key"] for row in batch)
                keys.writelines(map(key_hash, names))
        with pa.memory_map(str(spool)) as mapped:
            index = pa.ipc.open_stream(mapped).read_all()
            if duplicates := find_duplicates(lambda: _batches(hashes), len(index)):
                row = min(duplicates)
                key, first = index["key"][row].as_py(), duplicates[row]
                raise CorpusError(f"key {key!r} names rows {first} and {row}; make the keys distinct and import again")
            yield index


def _batches(hashes: Path) -> Iterator[NDArray[np.uint64]]:
    with hashes.open("rb") as file:
        while data := file.read(16 * _BATCH):
            yield np.frombuffer(data, dtype=np.uint64).reshape(-1, 2)
