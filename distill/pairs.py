"""The pairs of a run: rows of a store with a sound image and caption, captions as tokens, and where the images lie.
They take minutes to make and stay the same, so that `OUT/tokens/DIGEST` keeps them, mapped by every rank: the digest is
of what they follow from. They are no part of a run's state; damaged ones, or those of another tokenizer, are written
again."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from mmkd.base.conditions import parse_condition
from mmkd.base.errors import IncompleteStoreError
from mmkd.base.places.remote import in_parallel
from mmkd.distill.captions import Captions, Tokenize, evenly, numbers_of, tokenize_captions
from mmkd.distill.mapped import ArrayWriter, is_intact, map_arrays
from mmkd.distill.teacher_features import pack_available
from mmkd.distill.world import World
from mmkd.store import FeatureStore
from mmkd.store.encoding import VALID
from mmkd.store.samples import sample_schema, shard_table

FOLDER = "tokens"
PROBED = 256
"""Captions, spread evenly, that are tokenized again to see that the tokenizer is the same."""


@dataclass(frozen=True)
class ImagePlaces:
    """Where the images of n rows lie. rows: int64 (n,) grid rows, ascending. uri: uint8, the names one after another;
    uri_starts: int64 (n + 1,). offset, length: int64 (n,), bytes into the file, -1 when the image is the whole file.
    folder: where they are mapped from, if they are."""

    rows: NDArray[np.int64]
    uri: NDArray[np.uint8]
    uri_starts: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    folder: Path | None = None

    @classmethod
    def of(cls, table: pa.Table) -> "ImagePlaces":
        """Take them from sample rows."""
        names = [name.encode() for name in table["uri"].to_pylist()]
        starts = np.array([0, *map(len, names)], dtype=np.int64).cumsum()
        offset, length = (table[name].fill_null(-1).to_numpy() for name in ("offset", "length"))
        return cls(table["row"].to_numpy(), np.frombuffer(b"".join(names), np.uint8), starts, offset, length)

    @classmethod
    def map(cls, folder: Path) -> "ImagePlaces":
        """Map those of a run."""
        found, _ = map_arrays(folder)
        return cls(*(found[name] for name in ("rows", "uri", "uri_starts", "offset", "length")), folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send what is mapped by its folder: worker processes map it themselves."""
        if self.folder is not None:
            return ImagePlaces.map, (self.folder,)
        return ImagePlaces, (self.rows, self.uri, self.uri_starts, self.offset, self.length)

    def __getitem__(self, row: int) -> tuple[str, int | None, int | None]:
        """Return uri, offset and length of a grid row."""
        at = int(np.searchsorted(self.rows, row))
        name = self.uri[self.uri_starts[at] : self.uri_starts[at + 1]].tobytes().decode()
        offset, length = (int(column[at]) if column[at] >= 0 else None for column in (self.offset, self.length))
        return name, offset, length


@dataclass(frozen=True)
class Pairs:
    """The n pairs of a run in the order of their rows. captions: by pair. groups: int64 (n, 2), numbers of tokens and
    image, equal where these are. available: uint8 (N, T / 8) bits by grid row, see `TeacherFeatures`; None without
    teachers. counts: pairs that each teacher has. cut: captions that fill the context."""

    places: ImagePlaces
    captions: Captions
    groups: NDArray[np.int64]
    available: NDArray[np.uint8] | None
    counts: dict[str, int]
    cut: int

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 (n,), grid rows, ascending."""
        return self.places.rows

    def numbers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the pair of each of these grid rows."""
        return np.searchsorted(self.rows, rows)


def rows_where(store: FeatureStore, where: str, columns: list[str]) -> pa.Table:
    """Return sample rows that match a condition as after SQL's WHERE; all rows when it is empty. Raises ConfigError if
    it cannot be read, or names a column that the store does not have."""
    condition = parse_condition(where, store.samples.schema) if where else None
    return store.sample_table(columns=columns, filter=condition)


def is_pair(table: pa.Table) -> pa.ChunkedArray:
    """Return which sample rows have a sound image and a sound caption."""
    return pc.and_(pc.equal(table["status"], "ok"), pc.and_(table["uri"].is_valid(), table["caption"].is_valid()))


def refuse_pending(store: FeatureStore, pending: int, matching: int) -> None:
    """Raise IncompleteStoreError if some of the rows that match are pending."""
    if pending:
        raise IncompleteStoreError(
            f"{store.root}: {pending} of {matching} matching rows are not extracted yet; finish `mmkd extract` first"
        )


def count_pending(table: pa.Table) -> int:
    """Count rows that have not been extracted."""
    return int(pc.sum(pc.equal(table["status"], "pending")).as_py() or 0)


@dataclass(frozen=True)
class PairSource:
    """What the pairs of a run follow from. slugs: teachers of which a pair needs one; empty when none is asked. text:
    what is known of the tokenizer; that it gives the same tokens is looked at too."""

    store: FeatureStore
    where: str
    slugs: tuple[str, ...]
    selection: str | None
    tokenizer: Tokenize
    text: str = ""
    selection_digest: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex, 16 digits, over rows, condition, teachers and what the ledger says of samples and `valid`."""
        ledger = sorted(self.store.ledger.items())
        content = {
            "grid": [self.store.record.rows, *self.store.record.grid],
            "where": self.where,
            "teachers": {slug: self.store.card(slug).digest for slug in self.slugs},
            "selection": self.selection_digest,
            "text": self.text,
            "samples": {shard: entry.samples_sha256 for (shard, _), entry in ledger},
            "valid": [(*place, entry.valid_crc32c) for place, entry in ledger if place[1] in self.slugs],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def blocks(self) -> Iterator[tuple[pa.Table, dict[str, NDArray[Any]]]]:
        """Yield the pairs of each shard as sample rows, and the bits of its rows under `available`, where teachers are
        asked. Raises ConfigError for a bad condition; IncompleteStoreError, at the end, if rows are pending."""
        store, pending, matching = self.store, 0, 0
        condition = parse_condition(self.where, sample_schema(store.record.labels)) if self.where else None
        arrays = {slug: store.array(slug, VALID) for slug in self.slugs}
        chosen = store.available(self.selection) if self.selection and self.slugs else None
        order, size = list(store.teachers), store.record.rows_per_shard
        for shard, whole in enumerate(in_parallel(partial(shard_table, store), range(store.shards), store.root)):
            table = whole.filter(condition) if condition is not None else whole
            pending, matching = pending + count_pending(table), matching + len(table)
            usable, bits = is_pair(table), {}
            if self.slugs:
                first, last = shard * size, min((shard + 1) * size, len(store))
                if chosen is not None:
                    sound = chosen[first:last, [order.index(slug) for slug in self.slugs]]
                else:
                    columns = [arrays[slug].body(shard) == store.card(slug).all_sound for slug in self.slugs]
                    sound = np.stack(columns, axis=1)[: last - first]
                bits = {"available": pack_available(sound)}
                have = bits["available"].any(axis=1)[table["row"].to_numpy() - first]
                usable = pc.and_(usable, pa.array(have))
            yield (table if pending else table.filter(usable)).slice(0, 0 if pending else None), bits
        refuse_pending(store, pending, matching)


def open_pairs(out: Path, source: PairSource, world: World, scratch: Path | None = None) -> Pairs:
    """Map the pairs of a run from its folder `out`, written by the first rank when they are not there or damaged; with
    `scratch` each rank writes its own there and `out` stays as it is. Raises as `PairSource.blocks`; StoreError if the
    disk is full or read-only."""
    folder = out / FOLDER / source.digest
    if scratch is not None and not _is_right(folder, source):
        folder, world = scratch / FOLDER / source.digest, World(world.device)
    if not world.highest(int(world.first and _is_right(folder, source))):
        # A step for each shard, so that no rank waits for longer than that.
        for _ in _write(folder, source) if world.first else range(source.store.shards):
            world.highest(0)
        world.highest(0)
    found, notes = map_arrays(folder)
    captions = Captions(found["tokens"], found["token_starts"], notes["pad"], notes["context"])
    counts = dict(zip(source.slugs, notes["counts"], strict=True))
    return Pairs(ImagePlaces.map(folder), captions, found["groups"], found.get("available"), counts, notes["cut"])


def _is_right(folder: Path, source: PairSource) -> bool:
    """Return True if the folder is whole, and its tokens are those of the run's tokenizer."""
    if not is_intact(folder):
        return False
    found, notes = map_arrays(folder)
    kept = Captions(found["tokens"], found["token_starts"], notes["pad"], notes["context"])
    now = tokenize_captions([caption for _, caption in notes["probes"]], source.tokenizer)
    numbers = np.array([number for number, _ in notes["probes"]], dtype=np.int64)
    same = (kept.pad, kept.context) == (now.pad, now.context)
    return same and torch.equal(kept.tokens(numbers), now.tokens(np.arange(len(now))))


def _write(folder: Path, source: PairSource) -> Iterator[None]:
    """Write all pairs, a shard at a time; yields after each but ends only when they are whole."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    shards = source.store.shards
    logging.getLogger(__name__).info("tokenizing the captions of %d shards; the next start maps them", shards)
    counts, probes, pairs, cut, ends = np.zeros(len(source.slugs), np.int64), [], 0, 0, {"token": 0, "uri": 0}
    with ArrayWriter(folder) as writer:
        empty = tokenize_captions([], source.tokenizer)
        none = ImagePlaces.of(sample_schema(()).empty_table())
        writer.append({"token_starts": np.zeros(1, np.int64), "uri_starts": np.zeros(1, np.int64)})
        writer.append({"tokens": empty.values, "uri": none.uri, "rows": none.rows})
        for shard, (table, bits) in enumerate(source.blocks()):
            captions = table["caption"].combine_chunks().dictionary_encode()
            distinct = tokenize_captions(captions.dictionary.to_pylist(), source.tokenizer)
            number = captions.indices.to_numpy().astype(np.int64)
            own, places = distinct.take(number), ImagePlaces.of(table)
            images = table["image_sha256"].to_pylist()
            alone = np.array(
                [-1 - row if image is None else 0 for image, row in zip(images, places.rows, strict=True)], np.int64
            )
            image = np.where(alone, alone, numbers_of((image or "").encode() for image in images))
            if bits:
                have = bits["available"][places.rows - shard * source.store.record.rows_per_shard]
                counts += np.unpackbits(have, axis=1, count=len(counts)).sum(axis=0, dtype=np.int64)
            writer.append(
                {
                    "rows": places.rows, "groups": np.stack([distinct.numbers()[number], image], axis=1),
                    "tokens": own.values, "token_starts": own.starts[1:] + ends["token"],
                    "uri": places.uri, "uri_starts": places.uri_starts[1:] + ends["uri"],
                    "offset": places.offset, "length": places.length, **bits,
                }
            )  # fmt: skip
            if shard % -(-shards // PROBED) == 0:
                some = evenly(len(table), max(1, PROBED // shards))
                probes += [(pairs + int(at), table["caption"][int(at)].as_py()) for at in some]
            ends = {"token": ends["token"] + len(own.values), "uri": ends["uri"] + len(places.uri)}
            pairs, cut = pairs + len(table), cut + int((np.diff(own.starts) >= own.context).sum())
            yield
        notes = {"pad": empty.pad, "context": empty.context, "cut": cut, "counts": counts.tolist(), "probes": probes}
        writer.finish(notes)
    pa.default_memory_pool().release_unused()  # it would keep what reading took as long as the run lasts
