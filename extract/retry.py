"""Retry of failed images: their rows are read and encoded again; other rows of the shard stay."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from mmkd.extract.corpora.row import IMAGE_FAULT
from mmkd.extract.encode import Workbench, encode_images
from mmkd.extract.report import Clock, ShardReport
from mmkd.extract.shard import caption_faults, extract_shard, final_rows, image_sources, live_rows, sound_features
from mmkd.extract.teachers.protocol import Teacher
from mmkd.store import FeatureStore
from mmkd.store.layout import IMAGE_SOUND, TEXT_SOUND
from mmkd.store.ledger import entries_of_shard, remove_entry
from mmkd.store.record import Store
from mmkd.store.samples import read_part, write_part
from mmkd.store.writer import ShardFeatures, write_shard


def failed_images(table: pa.Table) -> list[int]:
    """Return places in the shard's table whose image could not be used. A caption's fault lies in the corpus' own
    table."""
    reasons = enumerate(table["reason"].to_pylist())
    return [place for place, reason in reasons if (reason or "").startswith(IMAGE_FAULT)]


def retry_shard(store: Store, shard: int, teachers: Mapping[str, Teacher], bench: Workbench) -> ShardReport:
    """Retry the failed images of a finished shard. Its ledger entries are removed while its files change, so a kill
    costs the shard, never correctness. The bytes equal those of a first extraction of the current images. Raises
    StoreError if the store cannot be written. `store`, `shard`, `bench`: as `extract_shard`. `teachers`: every teacher
    that has an entry for the shard."""
    started = time.perf_counter()
    table, _ = read_part(store.root, shard)
    report = ShardReport(shard, tuple(teachers))
    clock = Clock(report.seconds)
    places = failed_images(table)
    report.rows = len(places)
    if any(teacher.card.encoding == "int8" for teacher in teachers.values()):
        # Codes may change when decoded and encoded again: such a shard is redone as a whole.
        for slug in teachers:
            remove_entry(store.root, shard, slug)
        return extract_shard(store, shard, teachers, bench)
    some = table.take(pa.array(places, pa.int64()))
    live = live_rows(some)
    images, features = encode_images(
        image_sources(some, live, store.record.image_root(shard * store.record.rows_per_shard)), teachers, bench, clock
    )
    tried = final_rows(some, live, images, caption_faults(some, some["caption"].to_pylist()))
    report.status = dict(Counter(tried["status"].to_pylist()))
    report.reasons = dict(Counter(reason for reason in tried["reason"].to_pylist() if reason))
    sound = np.array([image is not None and image.reason is None for image in images], dtype=bool)
    if sound.any() or tried["reason"].to_pylist() != some["reason"].to_pylist():
        before = _before(store, shard, teachers)
        for slug in entries_of_shard(store.root, shard):
            remove_entry(store.root, shard, slug)
        with clock("samples"):
            sha = write_part(store.root, shard, _merged(table, places, tried))
        for slug, teacher in teachers.items():
            with clock(f"write {slug}"):
                shard_features = before[slug]
                good = sound_features(features[slug], sound)
                report.not_finite[slug] = int(np.count_nonzero(sound & ~good))
                shard_features.image[places] = features[slug]
                shard_features.valid[places] &= TEXT_SOUND
                shard_features.valid[np.array(places)[good]] |= IMAGE_SOUND
                write_shard(store, teacher.card, shard, shard_features, sha)
            bench.watch.beat()
    report.wall_seconds = time.perf_counter() - started
    return report


def _before(store: Store, shard: int, teachers: Mapping[str, Teacher]) -> dict[str, ShardFeatures]:
    """Return copies of the shard's stored arrays."""
    features = FeatureStore.open(store.root)
    rows = store.record.shard_rows(shard)
    rows_here = slice(rows.start, rows.stop)
    return {
        slug: ShardFeatures(
            np.array(features.image(slug)[rows_here]),
            np.array(features.text(slug)[rows_here]),
            np.array(features.valid(slug)[rows_here]),
        )
        for slug in teachers
    }


def _merged(table: pa.Table, places: list[int], tried: pa.Table) -> pa.Table:
    """Return the table with `tried` in these places."""
    order = np.arange(len(table))
    order[places] = len(table) + np.arange(len(places))
    return pa.concat_tables([table, tried]).take(pa.array(order)).combine_chunks()
