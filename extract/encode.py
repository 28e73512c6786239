"""A shard's images and captions through all its teachers: each image decoded and encoded once, each caption too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.images.source import ImageSource
from mmkd.base.process import Watch
from mmkd.extract.decoding import DecodedImage, decode_windows
from mmkd.extract.forward import PASS_ROWS, BatchSizes, encode
from mmkd.extract.isolated_decoding import isolated_windows
from mmkd.extract.report import Clock, ShardReport
from mmkd.extract.teachers.geometry import Geometry, geometry_of
from mmkd.extract.teachers.protocol import Teacher
from mmkd.store.encoding import value_type

Features = dict[str, NDArray[np.floating[Any]]]
"""By slug: (rows, D) in the float type that the teacher's encoding keeps, NaN where there is no input."""


@dataclass
class Workbench:
    """Worker state; `cluster_config.WorkerConfig` defines the numbers."""

    decode_threads: int = 2
    read_threads: int = 4
    sizes: BatchSizes = field(default_factory=BatchSizes)
    watch: Watch = field(default_factory=lambda: Watch(600))
    keep_inputs: int | None = None
    """Pixels of the JPEGs to make for training, too."""
    isolated: bool = False
    """Decode every image in its own process, for a shard that crashed its worker."""

    def windows(
        self, sources: Sequence[ImageSource], geometries: Sequence[Geometry], window: int
    ) -> Iterator[list[DecodedImage]]:
        if self.isolated:
            # Half the watchdog's time: the image fails, not the worker.
            seconds, beat = self.watch.seconds / 2, self.watch.beat
            return isolated_windows(sources, geometries, window, seconds=seconds, keep=self.keep_inputs, beat=beat)
        return decode_windows(sources, geometries, window, self.read_threads, self.decode_threads, self.keep_inputs)


def encode_images(
    sources: Sequence[ImageSource | None], teachers: Mapping[str, Teacher], bench: Workbench, clock: Clock
) -> tuple[list[DecodedImage | None], Features]:
    """Return outcome and features of each image, of the teachers with an image tower; None and NaN where a row has no
    image. An image of several rows (captions, or questions about it) is read, decoded and encoded once."""
    teachers = {slug: teacher for slug, teacher in teachers.items() if "image" in teacher.card.towers}
    distinct = list(dict.fromkeys(source for source in sources if source is not None))
    place = {source: index for index, source in enumerate(distinct)}
    rows = np.array([row for row, source in enumerate(sources) if source is not None], dtype=np.int64)
    of = np.array([place[source] for source in sources if source is not None], dtype=np.int64)
    geometries = {slug: geometry_of(teacher.card.image_preprocessing) for slug, teacher in teachers.items()}
    encoded = {slug: _missing(len(distinct), teacher) for slug, teacher in teachers.items()}
    facts: list[DecodedImage] = []
    used = tuple(dict.fromkeys(geometries.values()))
    window_rows = max((bench.sizes.window(teacher.device) for teacher in teachers.values()), default=1)
    for window in bench.windows(distinct, used, window_rows):
        there = [index for index, image in enumerate(window) if image.pixels]
        places = np.array(there, dtype=np.int64) + len(facts)
        pixels = {g: torch.from_numpy(np.stack([window[i].pixels[g] for i in there])) for g in used if there}
        for slug, teacher in teachers.items() if there else ():
            with clock(f"image {slug}"):
                encoded[slug][places] = encode(teacher, "image", pixels[geometries[slug]], bench.sizes)
            bench.watch.beat()
        for image in window:
            clock.add("read", image.read_seconds)
            clock.add("decode", image.decode_seconds)
            image.pixels.clear()
        facts.extend(window)
    features = {slug: _missing(len(sources), teacher) for slug, teacher in teachers.items()}
    for slug, values in features.items():
        values[rows] = encoded[slug][of]
    return [None if source is None else facts[place[source]] for source in sources], features


def encode_captions(
    captions: Sequence[str | None], teachers: Mapping[str, Teacher], bench: Workbench, report: ShardReport, clock: Clock
) -> Features:
    """Encode each distinct caption once, in order of length; returns features of each row, of the teachers with a text
    tower."""
    distinct = list(dict.fromkeys(caption for caption in captions if caption is not None))
    distinct.sort(key=lambda caption: (len(caption), caption))
    place = {caption: index for index, caption in enumerate(distinct)}
    rows = np.array([i for i, caption in enumerate(captions) if caption is not None], dtype=np.int64)
    source = np.array([place[caption] for caption in captions if caption is not None], dtype=np.int64)
    short = [caption[: 1 << 16] for caption in distinct]  # far beyond any context, to bound time and memory
    features = {}
    for slug, teacher in ((slug, teacher) for slug, teacher in teachers.items() if "text" in teacher.card.towers):
        with clock(f"text {slug}"):
            encoded, lengths = _encode_distinct(short, teacher, bench)
        features[slug] = _missing(len(captions), teacher)
        features[slug][rows] = encoded[source]
        report.truncated[slug] = int(np.count_nonzero(lengths[source] > teacher.card.context_length))
    return features


def _missing(rows: int, teacher: Teacher) -> NDArray[np.floating[Any]]:
    """Return NaN (rows, D)."""
    return np.full((rows, teacher.card.dim), np.nan, dtype=value_type(teacher.card.encoding))


def _encode_distinct(
    captions: list[str], teacher: Teacher, bench: Workbench
) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
    """Return features (n, D) and untruncated token counts (n,). Raises RuntimeError if the tokenizer failed."""
    encoded = _missing(len(captions), teacher)
    parts: list[torch.Tensor] = []
    counts: list[int] = []
    for start in range(0, len(captions), 256):
        try:
            tokens, some = teacher.tokenize(captions[start : start + 256])
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OverflowError) as error:
            # Its own message may quote a caption that names a patient.
            kind = type(error).__name__
            raise RuntimeError(f"teacher {teacher.card.slug!r}: its tokenizer raised {kind} on a caption") from None
        parts.append(tokens)
        counts += some
        bench.watch.beat()
    if parts:
        tokens = torch.cat(parts)
        cut = cut_lengths(tokens, getattr(teacher, "text_lengths", (teacher.card.context_length,)))
        rows = bench.sizes.window(teacher.device)
        for length in np.unique(cut):
            places = np.flatnonzero(cut == length)
            for start in range(0, len(places), rows):
                here = places[start : start + rows]
                encoded[here] = encode(teacher, "text", tokens[here, :length], bench.sizes)
                bench.watch.beat()
    return encoded, np.array(counts, dtype=np.int64)


def cut_lengths(tokens: torch.Tensor, lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return the columns of `tokens` that each caption is encoded with, int64 (n,). In order of length, `PASS_ROWS`
    captions each get the smallest of `lengths` (ascending, the last one L) that holds the longest of them and one token
    behind it. `tokens`: int64 (n, L), padded with one id; where that is the end token too, the first one counts."""
    changes = tokens[:, 1:] != tokens[:, :-1]
    places = torch.arange(2, tokens.shape[1] + 1)
    own = torch.where(changes, places, 1).amax(dim=1).numpy() if len(places) else np.ones(len(tokens), np.int64)
    steps = np.asarray(lengths, dtype=np.int64)
    found: NDArray[np.int64] = steps[np.searchsorted(steps, own)]
    order = np.argsort(found, kind="stable")
    for start in range(0, len(order), PASS_ROWS):
        together = order[start : start + PASS_ROWS]
        found[together] = found[together].max()
    return found
