"""One task: a shard's inputs in, whole chunks of every teacher that lacks it out. Knows no Dask.

The bytes written depend on the rows and the teachers alone: batches have a fixed shape and fixed
members, so neither the number of workers and threads nor an interruption can change a bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mmkd.extract.corpora.row import UNDECODABLE
from mmkd.extract.decoding import DecodedImage, decode_windows
from mmkd.extract.teachers.geometry import Geometry, geometry_of
from mmkd.extract.teachers.protocol import Teacher
from mmkd.store.images import ImageSource
from mmkd.store.inputs import SCHEMA, write_inputs
from mmkd.store.layout import IMAGE_SOUND, TEXT_SOUND
from mmkd.store.record import StoreRecord
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.writer import ShardFeatures, write_shard

BATCH_ROWS = 32
"""Rows a forward pass, always: a matrix product may round differently for another batch shape."""

MAX_CAPTION_CHARACTERS = 1 << 16
"""Of a caption, no more is tokenised: far beyond any context, and a bound on time and memory."""


@dataclass
class ShardReport:
    """What happened to one shard; goes back to the client and into the run's log."""

    shard: int
    teachers: tuple[str, ...]
    status: dict[str, int] = field(default_factory=dict)
    """Rows by status."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Failed and partial rows by reason."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`read`, `decode` (summed over threads), `write`, and `image SLUG`, `text SLUG` for the forward passes."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Captions longer than the teacher's context, by slug."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Features of sound inputs that came out NaN, infinite or zero, by slug."""
    changed: int = 0
    """Images that are not what they were when another teacher saw this shard."""


def extract_shard(
    root: Path,
    record: StoreRecord,
    shard: int,
    teachers: Mapping[str, Teacher],
    decode_threads: int,
    keep_inputs: int | None = None,
) -> ShardReport:
    """Extract one shard for these teachers and vouch for it in the ledger; with `keep_inputs`, keep its JPEGs too.

    Raises:
        StoreError: the store cannot be written. Nothing of this shard counts as done then.
    """
    table, sha_before = read_part(root, shard)
    report = ShardReport(shard, tuple(teachers))
    clock = Clock(report.seconds)
    live = [not (reason or "").startswith("key: ") for reason in table["reason"].to_pylist()]
    sources = _sources(table, live, record.image_root(shard * record.rows_per_shard))
    windows = decode_windows(sources, _distinct(teachers), BATCH_ROWS, decode_threads, keep_inputs)
    images, image_features = _encode_windows(len(table), windows, teachers, clock)
    captions = [
        caption if row_live else None for caption, row_live in zip(table["caption"].to_pylist(), live, strict=True)
    ]
    text_reasons = [caption_fault(caption) for caption in captions]
    usable = [None if fault else caption for caption, fault in zip(captions, text_reasons, strict=True)]
    text_features = encode_texts(usable, teachers, report, clock)
    final = _final_rows(table, live, images, text_reasons)
    report.status = dict(Counter(final["status"].to_pylist()))
    report.reasons = dict(Counter(reason for reason in final["reason"].to_pylist() if reason))

    seen_before = table["status"].to_pylist()
    sound_image = np.array([image is not None and image.reason is None for image in images], dtype=bool)
    with clock("write"):
        if "pending" in seen_before:
            sha = write_part(root, shard, final)
        else:
            # Another teacher has been here: its rows stand, and what changed since is not mixed in.
            sha = sha_before
            same = np.array(table["image_sha256"].to_pylist(), dtype=object) == np.array(
                final["image_sha256"].to_pylist(), dtype=object
            )
            report.changed = int(np.count_nonzero(~same))
            sound_image &= same
        sound_text = np.array([caption is not None for caption in usable], dtype=bool)
        for slug, teacher in teachers.items():
            valid = _soundness(image_features[slug], sound_image, text_features[slug], sound_text, report, slug)
            features = ShardFeatures(image_features[slug], text_features[slug], valid)
            write_shard(root, record, teacher.card, shard, features, sha)
        if keep_inputs is not None:
            write_inputs(root, shard, keep_inputs, _inputs_table(final, images, sound_image))
    return report


def caption_fault(caption: str | None) -> str | None:
    """Why a caption cannot be used, or None."""
    if caption is None:
        return None
    if UNDECODABLE in caption:
        return "caption: not UTF-8"
    return None if caption.strip() else "caption: empty"


class Clock:
    """`with clock("read"): ...` adds the seconds spent to a table."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.name = ""
        self.started = 0.0

    def __call__(self, name: str) -> Clock:
        self.name, self.started = name, time.perf_counter()
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.add(self.name, time.perf_counter() - self.started)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def encode_images(
    table: pa.Table, live: Sequence[bool], root: Path, teachers: Mapping[str, Teacher], threads: int, clock: Clock
) -> tuple[list[DecodedImage | None], dict[str, NDArray[np.float16]]]:
    """What each row's image turned out to be (None without one), and features float16 (rows, D) by slug.

    Rows whose image has a reason hold the feature of a black picture: the caller must not use them.
    """
    windows = decode_windows(_sources(table, live, root), _distinct(teachers), BATCH_ROWS, threads)
    return _encode_windows(len(table), windows, teachers, clock)


def _sources(table: pa.Table, live: Sequence[bool], root: Path) -> list[ImageSource | None]:
    columns = (table[name].to_pylist() for name in ("uri", "offset", "length"))
    return [
        ImageSource(root / uri, offset, length) if uri is not None and row_live else None
        for uri, offset, length, row_live in zip(*columns, live, strict=True)
    ]


def _distinct(teachers: Mapping[str, Teacher]) -> tuple[Geometry, ...]:
    return tuple(dict.fromkeys(geometry_of(teacher.card.preprocessing) for teacher in teachers.values()))


def _inputs_table(final: pa.Table, images: Sequence[DecodedImage | None], sound: NDArray[np.bool_]) -> pa.Table:
    """What `write_inputs` takes; rows whose image is not sound, or not what it was, have no JPEG."""
    jpegs = [image.jpeg if image is not None and good else None for image, good in zip(images, sound, strict=True)]
    return pa.table([final["row"], final["image_sha256"], pa.array(jpegs, pa.large_binary())], names=SCHEMA.names)


def _encode_windows(
    rows_of_shard: int,
    windows: Iterator[list[DecodedImage | None]],
    teachers: Mapping[str, Teacher],
    clock: Clock,
) -> tuple[list[DecodedImage | None], dict[str, NDArray[np.float16]]]:
    geometries = {slug: geometry_of(teacher.card.preprocessing) for slug, teacher in teachers.items()}
    features = {slug: _missing(rows_of_shard, teacher) for slug, teacher in teachers.items()}
    facts: list[DecodedImage | None] = []
    for window in windows:
        pixels = {geometry: _stack(window, geometry) for geometry in _distinct(teachers)}
        rows = slice(len(facts), len(facts) + len(window))
        for slug, teacher in teachers.items():
            batch = pixels[geometries[slug]]
            if batch is not None:
                with clock(f"image {slug}"):
                    encoded = teacher.encode_images(torch.from_numpy(batch).to(teacher.device))
                    features[slug][rows] = _half(encoded)[: len(window)]
        for image in window:
            if image is not None:
                clock.add("read", image.read_seconds)
                clock.add("decode", image.decode_seconds)
                image.pixels.clear()
        facts.extend(window)
    return facts, features


def _stack(window: Sequence[DecodedImage | None], geometry: Geometry) -> NDArray[np.uint8] | None:
    """uint8 (BATCH_ROWS, C, H, W), black where a row has no picture; None when no row has one."""
    pictures = {i: image.pixels[geometry] for i, image in enumerate(window) if image is not None and image.pixels}
    if not pictures:
        return None
    batch = np.zeros((BATCH_ROWS, *next(iter(pictures.values())).shape), dtype=np.uint8)
    for index, picture in pictures.items():
        batch[index] = picture
    return batch


def encode_texts(
    captions: Sequence[str | None], teachers: Mapping[str, Teacher], report: ShardReport, clock: Clock
) -> dict[str, NDArray[np.float16]]:
    """Each distinct caption once, in order of length, put back to its rows: float16 (rows, D) by slug, NaN for None."""
    distinct = list(dict.fromkeys(caption for caption in captions if caption is not None))
    distinct.sort(key=lambda caption: (len(caption), caption))
    place = {caption: index for index, caption in enumerate(distinct)}
    rows = np.array([i for i, caption in enumerate(captions) if caption is not None], dtype=np.int64)
    source = np.array([place[caption] for caption in captions if caption is not None], dtype=np.int64)
    features = {}
    for slug, teacher in teachers.items():
        with clock(f"text {slug}"):
            encoded, lengths = _encode_distinct([caption[:MAX_CAPTION_CHARACTERS] for caption in distinct], teacher)
        features[slug] = _missing(len(captions), teacher)
        features[slug][rows] = encoded[source]
        report.truncated[slug] = int(np.count_nonzero(lengths[source] > teacher.card.context_length))
    return features


def _encode_distinct(captions: list[str], teacher: Teacher) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Features float16 (n, D) and untruncated token counts (n,)."""
    encoded = [np.empty((0, teacher.card.dim), dtype=np.float16)]
    lengths: list[int] = []
    for start in range(0, len(captions), BATCH_ROWS):
        batch = captions[start : start + BATCH_ROWS]
        tokens, counts = teacher.tokenise(batch + [""] * (BATCH_ROWS - len(batch)))
        lengths += counts[: len(batch)]
        encoded.append(_half(teacher.encode_texts(tokens.to(teacher.device)))[: len(batch)])
    return np.concatenate(encoded), np.array(lengths, dtype=np.int64)


def _missing(rows: int, teacher: Teacher) -> NDArray[np.float16]:
    return np.full((rows, teacher.card.dim), np.nan, dtype=np.float16)


def _half(features: torch.Tensor) -> NDArray[np.float16]:
    half: NDArray[np.float16] = features.to(torch.float16).cpu().numpy()
    return half


def _soundness(
    image: NDArray[np.float16],
    sound_image: NDArray[np.bool_],
    text: NDArray[np.float16],
    sound_text: NDArray[np.bool_],
    report: ShardReport,
    slug: str,
) -> NDArray[np.uint8]:
    """The `valid` bits of one teacher; counts sound inputs whose feature is not."""
    valid = np.zeros(len(sound_image), dtype=np.uint8)
    for features, sound, bit in ((image, sound_image, IMAGE_SOUND), (text, sound_text, TEXT_SOUND)):
        norms = np.linalg.norm(features.astype(np.float32), axis=1)
        good = sound & np.isfinite(norms) & (norms > 0)
        valid[good] |= bit
        lost = int(np.count_nonzero(sound & ~good))
        if lost:
            report.not_finite[slug] = report.not_finite.get(slug, 0) + lost
    return valid


def _final_rows(
    table: pa.Table, live: Sequence[bool], images: Sequence[DecodedImage | None], text_reasons: Sequence[str | None]
) -> pa.Table:
    """The sample rows with status, reason and what the image turned out to be."""
    columns: dict[str, list[object]] = {name: [] for name in ("status", "reason", "width", "height", "image_sha256")}
    rows = zip(table["caption"].to_pylist(), table["reason"].to_pylist(), live, images, text_reasons, strict=True)
    for caption, reason, row_live, image, text_reason in rows:
        faults = [fault for fault in (image.reason if image else None, text_reason) if fault]
        something_sound = (image is not None and image.reason is None) or (caption is not None and text_reason is None)
        if row_live:
            columns["status"].append("ok" if not faults else "partial" if something_sound else "failed")
            columns["reason"].append("; ".join(faults) or None)
        else:
            columns["status"].append("failed")
            columns["reason"].append(reason)
        for name in ("width", "height", "image_sha256"):
            columns[name].append(getattr(image, name) if image else None)
    return with_columns(table, columns)
