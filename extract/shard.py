"""One task: a shard's inputs in, whole chunks of every teacher that lacks it out, and the retry of its failed images.
The bytes written depend on rows and teachers alone, not on workers, threads, batch size or interruptions."""

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.images.recipe import Recipe, read_recipe
from mmkd.base.images.source import ImageSource
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora.row import CAPTION_FAULT, IMAGE_FAULT, INDEX_FAULTS, ONE_SIDED
from mmkd.extract.decoding import DecodedImage
from mmkd.extract.encode import Workbench, encode_inputs
from mmkd.extract.report import Clock, ShardReport
from mmkd.extract.teachers.spec import Teacher
from mmkd.store import FeatureStore
from mmkd.store.inputs import SCHEMA, write_inputs
from mmkd.store.layout import IMAGE_SOUND, TEXT_SOUND, TOWERS
from mmkd.store.ledger import entries_of_shard, remove_entry
from mmkd.store.record import Store, StoreRecord
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.writer import ShardFeatures, write_shard


def extract_shard(store: Store, shard: int, teachers: Mapping[str, Teacher], bench: Workbench) -> ShardReport:
    """Extract one shard for these teachers and write its ledger entries. Raises StoreError if the store cannot be
    written; the shard then counts as not done. Raises TeacherError if a device has too little memory."""
    started = time.perf_counter()
    table, sha_before = read_part(store.root, shard)
    report = ShardReport(shard, tuple(teachers), rows=len(table))
    clock = Clock(report.seconds)
    live = _live_rows(table)
    sources = image_sources(table, live, store.record)
    captions = [text if row_live else None for text, row_live in zip(table["caption"].to_pylist(), live, strict=True)]
    faults = _caption_faults(table, captions)
    usable = [None if fault else caption for caption, fault in zip(captions, faults, strict=True)]
    images, image_features, text_features = encode_inputs(sources, usable, teachers, bench, report)
    features = {"image": image_features, "text": text_features}
    final = final_rows(table, live, images, faults)
    report.count(final)
    sound = {"image": _sound(images), "text": np.array([caption is not None for caption in usable], dtype=bool)}
    with clock("samples"):
        if any(slug not in teachers for slug in entries_of_shard(store.root, shard)):
            # Another teacher has been here: its rows stand, and what changed since is not mixed in.
            sha = sha_before
            before, now = (np.array(part["image_sha256"].to_pylist(), dtype=object) for part in (table, final))
            report.changed = int(np.count_nonzero(before != now))
            sound["image"] &= before == now
        else:
            sha = write_part(store.root, shard, final)
    for slug, teacher in teachers.items():
        with clock(f"write {slug}"):
            valid, lost = np.zeros(len(table), dtype=np.uint8), 0
            for tower, bit in teacher.card.sound_bits.items():
                good = sound_features(features[tower][slug], sound[tower])
                lost += int(np.count_nonzero(sound[tower] & ~good))
                valid |= good.astype(np.uint8) * np.uint8(bit)
            if lost:
                report.not_finite[slug] = lost
            image, text = (features[tower].get(slug) for tower in TOWERS)
            write_shard(store, teacher.card, shard, ShardFeatures(image, text, valid), sha)
        bench.watch.beat()
    if bench.keep_inputs is not None:
        # Rows whose image is unsound or changed have no JPEG.
        jpegs = [image.jpeg if image and good else None for image, good in zip(images, sound["image"], strict=True)]
        columns = [final["row"], final["image_sha256"], pa.array(jpegs, pa.large_binary())]
        write_inputs(store.root, shard, bench.keep_inputs, pa.table(columns, names=SCHEMA.names))
    halved = bench.sizes.halved.items()
    report.batch_rows = {f"{tower} {slug}": rows for (slug, tower), rows in halved if slug in teachers}
    report.wall_seconds = time.perf_counter() - started
    return report


def retry_shard(store: Store, shard: int, teachers: Mapping[str, Teacher], bench: Workbench) -> ShardReport:
    """Read and encode the failed images of a finished shard again, for every teacher that has an entry for it. The
    bytes equal those of a first extraction of the current images. Captions stay: their faults lie in the corpus' table.
    Ledger entries are removed while files change, so a kill costs the shard. Raises StoreError as `extract_shard`."""
    started = time.perf_counter()
    table, _ = read_part(store.root, shard)
    report = ShardReport(shard, tuple(teachers))
    clock = Clock(report.seconds)
    reasons = enumerate(table["reason"].to_pylist())
    places = np.array([place for place, reason in reasons if (reason or "").startswith(IMAGE_FAULT)], dtype=np.int64)
    report.rows = len(places)
    if any(teacher.card.encoding == "int8" for teacher in teachers.values()):
        # Codes may change when decoded and encoded again: such a shard is redone as a whole.
        for slug in teachers:
            remove_entry(store.root, shard, slug)
        return extract_shard(store, shard, teachers, bench)
    some = table.take(pa.array(places))
    live = _live_rows(some)
    sources = image_sources(some, live, store.record)
    images, features, _ = encode_inputs(sources, (), teachers, bench, report)
    tried = final_rows(some, live, images, _caption_faults(some, some["caption"].to_pylist()))
    report.count(tried)
    sound = _sound(images)
    if sound.any() or tried["reason"].to_pylist() != some["reason"].to_pylist():
        stored, own = FeatureStore.open(store.root), store.record.shard_rows(shard)
        before = {}
        for slug in teachers:
            rows, towers = slice(own.start, own.stop), teachers[slug].card.towers
            image, text = (np.array(stored.features(slug, t)[rows]) if t in towers else None for t in TOWERS)
            before[slug] = ShardFeatures(image, text, stored.valid(slug)[rows].copy())
        for slug in entries_of_shard(store.root, shard):
            remove_entry(store.root, shard, slug)
        order = np.arange(len(table))
        order[places] = len(table) + np.arange(len(places))
        with clock("samples"):
            sha = write_part(store.root, shard, pa.concat_tables([table, tried]).take(pa.array(order)).combine_chunks())
        for slug, teacher in teachers.items():
            with clock(f"write {slug}"):
                if (image := before[slug].image) is not None:
                    good = sound_features(features[slug], sound)
                    report.not_finite[slug] = int(np.count_nonzero(sound & ~good))
                    image[places] = features[slug]
                    before[slug].valid[places] &= TEXT_SOUND
                    before[slug].valid[places[good]] |= IMAGE_SOUND
                write_shard(store, teacher.card, shard, before[slug], sha)
            bench.watch.beat()
    report.wall_seconds = time.perf_counter() - started
    return report


def _live_rows(table: pa.Table) -> list[bool]:
    """Return whether each row's inputs are read: all but those that the index refused."""
    return [not (reason or "").startswith(INDEX_FAULTS) for reason in table["reason"].to_pylist()]


SOURCE_COLUMNS = ("row", "key", "uri", "offset", "length", "view_number")


def image_sources(
    table: pa.Table, live: Sequence[bool], record: StoreRecord, root: str | None = None
) -> list[ImageSource | None]:
    """Return the source of each live row's image or picture made of one; None for other rows and for texts without an
    image. `table`: at least `SOURCE_COLUMNS`; `root`: where the images lie, if not where the record says. Raises
    ConfigError, UserError as `read_recipe`."""

    @cache
    def about(shard: int) -> tuple[str, Recipe | None]:
        corpus = record.span_of(shard * record.rows_per_shard).corpus
        return root or corpus.root, None if corpus.recipe is None else read_recipe(corpus.recipe, "the store's record")

    found: list[ImageSource | None] = []
    columns = (table[name].to_pylist() for name in SOURCE_COLUMNS)
    for row, key, uri, offset, length, number, row_live in zip(*columns, live, strict=True):
        source = None
        if uri is not None and row_live:
            place, recipe = about(row // record.rows_per_shard)
            source = image_source(place, uri, offset, length)
            source = source if recipe is None else recipe.source(source, key, number)
        found.append(source)
    return found


def caption_fault(caption: str | None) -> str | None:
    """Return why a caption cannot be used, or None."""
    return f"{CAPTION_FAULT}empty" if caption is not None and not caption.strip() else None


def _caption_faults(table: pa.Table, captions: Sequence[str | None]) -> list[str | None]:
    """Return why each row's caption cannot be used, or None; what the index or an earlier teacher found comes first."""
    return [
        next((part for part in (reason or "").split("; ") if part.startswith(CAPTION_FAULT)), caption_fault(caption))
        for reason, caption in zip(table["reason"].to_pylist(), captions, strict=True)
    ]


def _sound(images: Sequence[DecodedImage | None]) -> NDArray[np.bool_]:
    return np.array([image is not None and image.reason is None for image in images], dtype=bool)


def sound_features(features: NDArray[np.floating[Any]], sound: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool (rows,), True for sound inputs whose feature, a row of (rows, D), is finite and not zero."""
    norms = np.linalg.norm(features.astype(np.float32), axis=1)
    return sound & np.isfinite(norms) & (norms > 0)


def final_rows(
    table: pa.Table, live: Sequence[bool], images: Sequence[DecodedImage | None], text_reasons: Sequence[str | None]
) -> pa.Table:
    """Return the sample rows with status, reason and the image's properties."""
    columns: dict[str, list[object]] = {name: [] for name in ("status", "reason", "width", "height", "image_sha256")}
    rows = zip(table["caption"].to_pylist(), table["reason"].to_pylist(), live, images, text_reasons, strict=True)
    for caption, reason, row_live, image, text_reason in rows:
        one_sided = next((part for part in (reason or "").split("; ") if part in ONE_SIDED), None)
        faults = [fault for fault in (image.reason if image else None, text_reason, one_sided) if fault]
        something_sound = (image is not None and image.reason is None) or (caption is not None and text_reason is None)
        notes = [image.note] if image and image.note else []
        failed = not row_live or (faults and not something_sound)
        columns["status"].append("failed" if failed else "partial" if faults else "ok")
        columns["reason"].append(("; ".join([*faults, *notes]) or None) if row_live else reason)
        for name in ("width", "height", "image_sha256"):
            columns[name].append(getattr(image, name, None))
    return with_columns(table, columns)
