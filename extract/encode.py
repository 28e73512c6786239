"""A shard's images and captions through all its teachers: each image decoded and encoded once, each caption too."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.images.source import ImageSource
from mmkd.base.process import Watch
from mmkd.extract.decoding import DecodedImage, Threads, decode_windows
from mmkd.extract.device import PASS_ROWS, Device, Host
from mmkd.extract.forward import BatchSizes, Queue
from mmkd.extract.isolated_decoding import isolated_windows
from mmkd.extract.report import Clock, ShardReport
from mmkd.extract.teachers.geometry import Geometry, geometry_of
from mmkd.extract.teachers.spec import Teacher
from mmkd.store.encoding import value_type
from mmkd.store.layout import TOWERS

Features = dict[str, NDArray[np.floating[Any]]]
"""By slug: (rows, D) in the float type that the teacher's encoding keeps, NaN where there is no input."""


@dataclass
class Workbench:
    """Worker state; `cluster_config.WorkerConfig` defines the numbers."""

    threads: Threads = field(default_factory=Threads)
    device: Device = field(default_factory=Host)
    sizes: BatchSizes = field(default_factory=BatchSizes)
    watch: Watch = field(default_factory=lambda: Watch(600))
    keep_inputs: int | None = None
    """Pixels of the JPEGs to make for training, too."""
    isolated: bool = False
    """Decode every image in its own process, for a shard that crashed its worker."""
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Held by the shard whose windows go to the device. The other one in hand has its images ready by then, and writes
    when the turn has passed: the device has work, and two shards never want its memory at the same time."""

    def windows(
        self, sources: Sequence[ImageSource], geometries: Sequence[Geometry], window: int
    ) -> Iterator[list[DecodedImage]]:
        if self.isolated:
            # Half the watchdog's time: the image fails, not the worker.
            seconds, beat = self.watch.seconds / 2, self.watch.beat
            return isolated_windows(sources, geometries, window, seconds=seconds, keep=self.keep_inputs, beat=beat)
        return decode_windows(sources, geometries, window, self.threads, self.keep_inputs)


def encode_inputs(
    sources: Sequence[ImageSource | None],
    captions: Sequence[str | None],
    teachers: Mapping[str, Teacher],
    bench: Workbench,
    report: ShardReport,
) -> tuple[list[DecodedImage | None], Features, Features]:
    """Return outcome of each image, and features of images and captions, each of the teachers with such a tower; None
    and NaN where a row has none. An image or caption of several rows (captions, or questions about an image) is read
    and encoded once. Raises RuntimeError if a tokenizer failed; TeacherError if the device has too little memory."""
    clock = Clock(report.seconds)
    queue = Queue(bench.device, bench.sizes, bench.watch, report)
    distinct = list(dict.fromkeys(source for source in sources if source is not None))
    seeing, reading = ({slug: one for slug, one in teachers.items() if tower in one.card.towers} for tower in TOWERS)
    geometries = {slug: geometry_of(teacher.card.image_preprocessing) for slug, teacher in seeing.items()}
    used = tuple(dict.fromkeys(geometries.values()))
    window_rows = max((bench.sizes.window(teacher, "image") for teacher in seeing.values()), default=1)
    windows = bench.windows(distinct, used, window_rows)  # from here on images are read and decoded
    # In order of length.
    short = sorted({one for one in captions if one is not None}, key=lambda one: (len(one), one))
    with clock("tokens"):
        tokens = {slug: _tokenize(short, teacher, bench) for slug, teacher in reading.items()}
    images = {slug: _missing(len(distinct), teacher) for slug, teacher in seeing.items()}
    texts = {slug: _missing(len(short), teacher) for slug, teacher in reading.items()}
    captions_due = [
        (teacher, tokens[slug][0], texts[slug], *part)
        for slug, teacher in reading.items()
        for part in text_windows(tokens[slug][0], teacher, bench.sizes.window(teacher, "text"))
    ]
    facts: list[DecodedImage] = []
    rounds = max(1, -(-len(distinct) // window_rows))
    with bench.turn:
        for index in range(rounds):
            # Captions between the images: the device then wants images at one rate, which threads can keep up with.
            due = slice(len(captions_due) * index // rounds, len(captions_due) * (index + 1) // rounds)
            for teacher, ids, target, length, here in captions_due[due]:
                queue.launch(teacher, "text", queue.stage(list(ids[here, :length].long().numpy())), target, here)
            window = _next_window(windows, bench.threads, clock)
            there = [number for number, image in enumerate(window) if image.pixels]
            places = np.array(there, dtype=np.int64) + len(facts)
            if there:
                pixels = {g: queue.stage([window[i].pixels[g] for i in there]) for g in used}
                for slug, teacher in seeing.items():
                    queue.launch(teacher, "image", pixels[geometries[slug]], images[slug], places)
            queue.settle(bench.device.ahead)
            for image in window:
                image.pixels.clear()
            facts.extend(window)
    queue.settle()
    place = {source: index for index, source in enumerate(distinct)}
    number = {caption: index for index, caption in enumerate(short)}
    row_captions = [None if one is None else number[one] for one in captions]
    said = [one for one in row_captions if one is not None]
    for slug, teacher in reading.items():
        report.truncated[slug] = int(np.count_nonzero(tokens[slug][1][said] > teacher.card.context_length))
    return (
        [None if source is None else facts[place[source]] for source in sources],
        _to_rows([None if source is None else place[source] for source in sources], images, seeing),
        _to_rows(row_captions, texts, reading),
    )


def _next_window(windows: Iterator[list[DecodedImage]], threads: Threads, clock: Clock) -> list[DecodedImage]:
    """Return the next window, empty behind the last one. The time that it was waited for is counted to what takes
    longer, reading or decoding."""
    started = time.perf_counter()
    window = next(windows, [])
    waited = time.perf_counter() - started
    read, decode = (sum(getattr(image, f"{what}_seconds") for image in window) for what in ("read", "decode"))
    clock.add("read", read)
    clock.add("decode", decode)
    clock.add("await-read" if read / threads.read > decode / threads.decode else "await-decode", waited)
    return window


def _to_rows(rows: Sequence[int | None], encoded: Features, teachers: Mapping[str, Teacher]) -> Features:
    """Return the features (n, D) of distinct inputs, whose numbers `rows` has, as those of the rows."""
    there = np.array([row for row, index in enumerate(rows) if index is not None], dtype=np.int64)
    of = np.array([index for index in rows if index is not None], dtype=np.int64)
    features = {slug: _missing(len(rows), teacher) for slug, teacher in teachers.items()}
    for slug, values in features.items():
        values[there] = encoded[slug][of]
    return features


def _missing(rows: int, teacher: Teacher) -> NDArray[np.floating[Any]]:
    """Return NaN (rows, D)."""
    return np.full((rows, teacher.card.dim), np.nan, dtype=value_type(teacher.card.encoding))


def _tokenize(captions: list[str], teacher: Teacher, bench: Workbench) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return token ids int32 (n, L) and untruncated token counts (n,). Raises RuntimeError if the tokenizer failed."""
    parts = [torch.zeros(0, teacher.card.context_length, dtype=torch.int64)]
    counts: list[int] = []
    for start in range(0, len(captions), 256):
        try:
            # Far beyond any context they are cut, to bound time and memory.
            tokens, some = teacher.tokenize([one[: 1 << 16] for one in captions[start : start + 256]])
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OverflowError) as error:
            # Its own message may quote a caption that names a patient.
            kind = type(error).__name__
            raise RuntimeError(f"teacher {teacher.card.slug!r}: its tokenizer raised {kind} on a caption") from None
        parts.append(tokens)
        counts += some
        bench.watch.beat()
    return torch.cat(parts[1:] or parts).int(), np.array(counts, dtype=np.int64)


def text_windows(tokens: torch.Tensor, teacher: Teacher, rows: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the length that token ids (n, L) are cut to, and the places of at most `rows` of that length."""
    cut = cut_lengths(tokens, getattr(teacher, "text_lengths", (teacher.card.context_length,)))
    for length in np.unique(cut):
        places = np.flatnonzero(cut == length)
        for start in range(0, len(places), rows):
            yield int(length), places[start : start + rows]


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
