"""One task: a shard's inputs in, whole chunks of every teacher that lacks it out. Knows no Dask. The bytes written
depend on the rows and the teachers alone: forward passes have a fixed shape, so neither the number of workers and
threads nor the batch size nor an interruption can change a bit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.images.source import ImageSource
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora.row import CAPTION_FAULT, INDEX_FAULTS, ONE_SIDED
from mmkd.extract.decoding import DecodedImage
from mmkd.extract.encode import Features, Workbench, encode_captions, encode_images
from mmkd.extract.report import Clock, ShardReport
from mmkd.extract.teachers.protocol import Teacher
from mmkd.store.inputs import SCHEMA, write_inputs
from mmkd.store.layout import IMAGE_SOUND, TEXT_SOUND
from mmkd.store.ledger import entries_of_shard
from mmkd.store.record import Store
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.writer import ShardFeatures, write_shard


def extract_shard(store: Store, shard: int, teachers: Mapping[str, Teacher], bench: Workbench) -> ShardReport:
    """Extract one shard for these teachers and write its ledger entries. Raises StoreError if the store cannot be
    written. The shard then counts as not done. Raises TeacherError if a device has too little memory."""
    started = time.perf_counter()
    table, sha_before = read_part(store.root, shard)
    report = ShardReport(shard, tuple(teachers), rows=len(table))
    clock = Clock(report.seconds)
    live = live_rows(table)
    images, image_features = encode_images(
        image_sources(table, live, store.record.image_root(shard * store.record.rows_per_shard)), teachers, bench, clock
    )
    captions = [
        caption if row_live else None for caption, row_live in zip(table["caption"].to_pylist(), live, strict=True)
    ]
    text_reasons = caption_faults(table, captions)
    usable = [None if fault else caption for caption, fault in zip(captions, text_reasons, strict=True)]
    text_features = encode_captions(usable, teachers, bench, report, clock)
    final = final_rows(table, live, images, text_reasons)
    report.status = dict(Counter(final["status"].to_pylist()))
    report.reasons = dict(Counter(reason for reason in final["reason"].to_pylist() if reason))

    sound_image = np.array([image is not None and image.reason is None for image in images], dtype=bool)
    with clock("samples"):
        if any(slug not in teachers for slug in entries_of_shard(store.root, shard)):
            # Another teacher has been here: its rows stand, and what changed since is not mixed in.
            sha = sha_before
            same = np.array(table["image_sha256"].to_pylist(), dtype=object) == np.array(
                final["image_sha256"].to_pylist(), dtype=object
            )
            report.changed = int(np.count_nonzero(~same))
            sound_image &= same
        else:
            sha = write_part(store.root, shard, final)
    sound_text = np.array([caption is not None for caption in usable], dtype=bool)
    for slug, teacher in teachers.items():
        with clock(f"write {slug}"):
            valid = soundness(slug, (image_features, sound_image), (text_features, sound_text), report)
            features = ShardFeatures(image_features[slug], text_features[slug], valid)
            write_shard(store, teacher.card, shard, features, sha)
        bench.watch.beat()
    if bench.keep_inputs is not None:
        write_inputs(store.root, shard, bench.keep_inputs, _inputs_table(final, images, sound_image))
    sizes = bench.sizes.halved.items()
    report.batch_rows = {f"{tower} {slug}": rows for (slug, tower), rows in sizes if slug in teachers}
    report.wall_seconds = time.perf_counter() - started
    return report


def live_rows(table: pa.Table) -> list[bool]:
    """Return rows whose inputs are read: all but those that the index refused."""
    return [not (reason or "").startswith(INDEX_FAULTS) for reason in table["reason"].to_pylist()]


def image_sources(table: pa.Table, live: Sequence[bool], root: str) -> list[ImageSource | None]:
    """Return the source of each live row's image; None for other rows and for texts without an image."""
    columns = (table[name].to_pylist() for name in ("uri", "offset", "length"))
    return [
        image_source(root, uri, offset, length) if uri is not None and row_live else None
        for uri, offset, length, row_live in zip(*columns, live, strict=True)
    ]


def caption_fault(caption: str | None) -> str | None:
    """Return why a caption cannot be used, or None."""
    if caption is None:
        return None
    return None if caption.strip() else f"{CAPTION_FAULT}empty"


def _indexed_fault(reason: str | None) -> str | None:
    """Return the caption fault known from the index or an earlier teacher: a truncated or overlong sidecar."""
    return next((part for part in (reason or "").split("; ") if part.startswith(CAPTION_FAULT)), None)


def caption_faults(table: pa.Table, captions: Sequence[str | None]) -> list[str | None]:
    """Return why each row's caption cannot be used, or None; known faults come first."""
    said = map(_indexed_fault, table["reason"].to_pylist())
    return [fault or caption_fault(caption) for fault, caption in zip(said, captions, strict=True)]


def _inputs_table(final: pa.Table, images: Sequence[DecodedImage | None], sound: NDArray[np.bool_]) -> pa.Table:
    """Return the table for `write_inputs`; rows whose image is unsound or changed have no JPEG."""
    jpegs = [image.jpeg if image is not None and good else None for image, good in zip(images, sound, strict=True)]
    return pa.table([final["row"], final["image_sha256"], pa.array(jpegs, pa.large_binary())], names=SCHEMA.names)


def sound_features(features: NDArray[np.floating[Any]], sound: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool (rows,), True for sound inputs whose feature, a row of (rows, D), is finite and not zero."""
    norms = np.linalg.norm(features.astype(np.float32), axis=1)
    good: NDArray[np.bool_] = sound & np.isfinite(norms) & (norms > 0)
    return good


def soundness(
    slug: str,
    image: tuple[Features, NDArray[np.bool_]],
    text: tuple[Features, NDArray[np.bool_]],
    report: ShardReport,
) -> NDArray[np.uint8]:
    """Return the `valid` bits uint8 (rows,): sound inputs (the second of each pair) whose feature is finite and not
    zero."""
    valid = np.zeros(len(image[1]), dtype=np.uint8)
    for (features, sound), bit in ((image, IMAGE_SOUND), (text, TEXT_SOUND)):
        good = sound_features(features[slug], sound)
        valid[good] |= bit
        lost = int(np.count_nonzero(sound & ~good))
        if lost:
            report.not_finite[slug] = report.not_finite.get(slug, 0) + lost
    return valid


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
        if row_live:
            columns["status"].append("ok" if not faults else "partial" if something_sound else "failed")
            notes = [image.note] if image and image.note else []
            columns["reason"].append("; ".join([*faults, *notes]) or None)
        else:
            columns["status"].append("failed")
            columns["reason"].append(reason)
        for name in ("width", "height", "image_sha256"):
            columns[name].append(getattr(image, name) if image else None)
    return with_columns(table, columns)
