"""State a worker process keeps between its shards: threads, batch sizes, and its watchdog."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mmkd.base.images.source import ImageSource
from mmkd.extract.decoding import DecodedImage, decode_windows
from mmkd.extract.forward import BatchSizes
from mmkd.extract.isolated_decoding import isolated_windows
from mmkd.extract.progress import Watch
from mmkd.extract.teachers.geometry import Geometry


@dataclass
class Workbench:
    """See `cluster_config.WorkerConfig` for what the numbers mean."""

    decode_threads: int = 2
    read_threads: int = 4
    sizes: BatchSizes = field(default_factory=BatchSizes)
    watch: Watch = field(default_factory=lambda: Watch(600))
    keep_inputs: int | None = None
    """Pixels of the JPEGs to make for training, too."""
    isolated: bool = False
    """Decode every image in a process of its own: for a shard that took its worker down."""

    def windows(
        self, sources: Sequence[ImageSource], geometries: Sequence[Geometry], window: int
    ) -> Iterator[list[DecodedImage]]:
        """The images in order, `window` of them at a time."""
        if self.isolated:
            # Half the watchdog's time: the image fails, not the worker.
            return isolated_windows(
                sources,
                geometries,
                window,
                seconds=self.watch.seconds / 2,
                keep=self.keep_inputs,
                beat=self.watch.beat,
            )
        return decode_windows(sources, geometries, window, self.read_threads, self.decode_threads, self.keep_inputs)
