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
from functools import cached_property
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
from mmkd.distill.image_places import ImagePlaces
from mmkd.distill.mapped import ArrayWriter, is_intact, map_arrays
from mmkd.distill.teacher_features import taught_bits, unpack_taught
from mmkd.distill.world import World
from mmkd.store import FeatureStore
from mmkd.store.encoding import VALID
from mmkd.store.samples import sample_schema, shard_table

FOLDER = "tokens"
PROBED = 256
"""Captions, spread evenly, that are tokenized again to see that the tokenizer is the same."""


@dataclass(frozen=True)
class Pairs:
    """The n rows of a run, in order: pairs, and rows with an image or a caption alone. captions: by row; empty where
    there is none. groups: int64 (n, 2), numbers of tokens and image, equal where these are, -1 where there is none.
    bits: `taught_bits` by grid row; None without teachers. counts: pairs, lone images and lone texts, the latter two
    only where there are any. taught: rows that each teacher teaches. cut: captions that fill the context."""

    places: ImagePlaces
    captions: Captions
    groups: NDArray[np.int64]
    bits: NDArray[np.uint8] | None
    counts: dict[str, int]
    taught: dict[str, int]
    cut: int

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 (n,), grid rows, ascending."""
        return self.places.rows

    @property
    def all_paired(self) -> bool:
        """True if no row has an image or a caption alone."""
        return len(self.counts) == 1

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


def _sound_parts(table: pa.Table) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return where rows have a sound image, and where a sound caption; views and further captions have neither."""
    ok, partial = (pc.and_(table["image_rows"].is_null(), pc.equal(table["status"], s)) for s in ("ok", "partial"))
    wrong = pc.match_substring_regex(table["reason"], "(^|; )caption: ").fill_null(False)
    image = pc.or_(ok, pc.and_(partial, table["width"].is_valid()))
    text = pc.or_(ok, pc.and_(partial, pc.invert(wrong)))
    return pc.and_(image, table["uri"].is_valid()), pc.and_(text, pc.not_equal(table["caption"].fill_null(""), ""))


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
    unpaired: bool = False

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex, 16 digits, over rows, condition, teachers and what the ledger says of samples and `valid`."""
        ledger = sorted(self.store.ledger.items())
        content = {
            "format": 1,
            "grid": [self.store.record.rows, *self.store.record.grid],
            "where": self.where,
            "unpaired": self.unpaired,
            "teachers": {slug: self.store.card(slug).digest for slug in self.slugs},
            "selection": self.selection_digest,
            "text": self.text,
            "samples": {shard: entry.samples_sha256 for (shard, _), entry in ledger},
            "valid": [(*place, entry.valid_crc32c) for place, entry in ledger if place[1] in self.slugs],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def blocks(self) -> Iterator[tuple[pa.Table, dict[str, NDArray[Any]]]]:
        """Yield the rows of each shard that are trained on, without caption, or uri and hash, where these are not
        sound, and `taught_bits` of all its rows under `bits`, where teachers are asked. Raises ConfigError for a bad
        condition; IncompleteStoreError, at the end, if rows are pending."""
        store, pending, matching = self.store, 0, 0
        condition = parse_condition(self.where, sample_schema(store.record.labels)) if self.where else None
        arrays = {slug: store.array(slug, VALID) for slug in self.slugs}
        chosen = store.available(self.selection) if self.selection and self.slugs else None
        cards, order = [store.card(slug) for slug in self.slugs], list(store.teachers)
        size = store.record.rows_per_shard

        def read(shard: int) -> tuple[pa.Table, list[NDArray[Any]]]:
            return shard_table(store, shard), [arrays[slug].body(shard) for slug in self.slugs]

        for shard, (whole, valids) in enumerate(in_parallel(read, range(store.shards), store.root)):
            table = whole.filter(condition) if condition is not None else whole
            pending, matching = pending + count_pending(table), matching + len(table)
            image, text = _sound_parts(table) if self.unpaired else (is_pair(table),) * 2
            usable, bits = pc.or_(image, text), {}
            if cards:
                first, last = shard * size, min((shard + 1) * size, len(store))
                valid = np.stack(valids, axis=1)[: last - first]
                if chosen is None:
                    kept = valid == [card.all_sound for card in cards]
                else:
                    kept = chosen[first:last, [order.index(slug) for slug in self.slugs]]
                # Of a view or further caption there is one tower by design.
                single = store.record.span_of(first).corpus.is_linked
                bits = {"bits": taught_bits(valid, cards, kept, unpaired=self.unpaired or single)}
                have = np.asarray(bits["bits"].any(axis=1))[table["row"].to_numpy() - first]
                usable = pc.and_(usable, pa.array(have))
            for names, sound in ((("caption",), text), (("uri", "image_sha256"), image)):
                for at in map(table.schema.get_field_index, names):
                    part = pc.if_else(sound, table[at], None)
                    table = table.set_column(at, table.schema.field(at), part)
            yield table.filter(usable) if not pending else table.slice(0, 0), bits
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
    taught = dict(zip(source.slugs, notes["taught"], strict=True))
    places, bits = ImagePlaces.map(folder), found.get("bits")
    return Pairs(places, captions, found["groups"], bits, notes["counts"], taught, notes["cut"])


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
    taught, kinds, probes = np.zeros(len(source.slugs), np.int64), np.zeros(3, np.int64), []
    rows, cut, ends = 0, 0, {"token": 0, "uri": 0}
    with ArrayWriter(folder) as writer:
        empty = tokenize_captions([], source.tokenizer)
        none = ImagePlaces.of(sample_schema(()).empty_table())
        writer.append({"token_starts": np.zeros(1, np.int64), "uri_starts": np.zeros(1, np.int64)})
        writer.append({"tokens": empty.values, "uri": none.uri, "rows": none.rows})
        for shard, (table, bits) in enumerate(source.blocks()):
            (own, said), places = _tokens_of(table, source.tokenizer), ImagePlaces.of(table)
            groups = np.stack([said, _image_numbers(table)], axis=1)
            if bits:
                first = shard * source.store.record.rows_per_shard
                have = unpack_taught(bits["bits"][places.rows - first], len(taught))
                taught += have.any(axis=2).sum(axis=0)
            writer.append(
                {
                    "rows": places.rows, "groups": groups, "tokens": own.values,
                    "token_starts": own.starts[1:] + ends["token"], "uri": places.uri,
                    "uri_starts": places.uri_starts[1:] + ends["uri"], "offset": places.offset,
                    "length": places.length, **bits,
                }
            )  # fmt: skip
            if shard % -(-shards // PROBED) == 0:
                said = np.flatnonzero(said >= 0)
                some = said[evenly(len(said), max(1, PROBED // shards))].tolist()
                probes += [(rows + at, table["caption"][at].as_py()) for at in some]
            ends = {"token": ends["token"] + len(own.values), "uri": ends["uri"] + len(places.uri)}
            rows, cut = rows + len(table), cut + int((np.diff(own.starts) >= own.context).sum())
            there = groups >= 0
            kinds += [there.all(axis=1).sum(), (~there[:, 0]).sum(), (~there[:, 1]).sum()]
            yield
        named = zip(("pair", "lone image", "lone text"), kinds.tolist(), strict=True)
        counts = {name: count for name, count in named if count or name == "pair"}
        notes = {"pad": empty.pad, "context": empty.context, "cut": cut, "counts": counts, "probes": probes}
        writer.finish(notes | {"taught": taught.tolist()})
    pa.default_memory_pool().release_unused()  # it would keep what reading took as long as the run lasts


def _tokens_of(table: pa.Table, tokenizer: Tokenize) -> tuple[Captions, NDArray[np.int64]]:
    """Return the captions of sample rows, empty where there is none, and their numbers, -1 there."""
    encoded = table["caption"].combine_chunks().dictionary_encode()
    distinct = tokenize_captions(encoded.dictionary.to_pylist(), tokenizer)
    number = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    said = distinct.take(number[number >= 0])
    lengths = np.zeros(len(table) + 1, np.int64)
    lengths[1:][number >= 0] = np.diff(said.starts)
    captions = Captions(said.values, lengths.cumsum(), distinct.pad, distinct.context)
    return captions, np.append(distinct.numbers(), -1)[number]


def _image_numbers(table: pa.Table) -> NDArray[np.int64]:
    """Return a number for each row's image, int64 (n,), -1 where there is none; one without a hash is alone."""
    rows = zip(table["uri"].to_pylist(), table["image_sha256"].to_pylist(), table["row"].to_pylist(), strict=True)
    named = [None if uri is None else (sha256 or f"row {row}").encode() for uri, sha256, row in rows]
    numbers = numbers_of(name or b"" for name in named)
    return np.where(np.array([name is None for name in named], dtype=bool), -1, numbers)
