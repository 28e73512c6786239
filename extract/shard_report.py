"""What happened to one shard, and how long each step took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class ShardReport:
    """What happened to one shard; goes back to the client and into the run's log."""

    shard: int
    teachers: tuple[str, ...]
    rows: int = 0
    """Rows whose inputs were read: those of the shard, or those that were tried again."""
    status: dict[str, int] = field(default_factory=dict)
    """Rows by status."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Failed and partial rows by reason."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`read` and `decode` (summed over threads), `samples`, and for each teacher `image SLUG`, `text SLUG` (the
    forward passes) and `write SLUG`."""
    wall_seconds: float = 0.0
    truncated: dict[str, int] = field(default_factory=dict)
    """Captions longer than the teacher's context, by slug."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Features of sound inputs that came out NaN, infinite or zero, by slug."""
    changed: int = 0
    """Images that are not what they were when another teacher saw this shard."""
    batch_rows: dict[str, int] = field(default_factory=dict)
    """`image SLUG` or `text SLUG`: rows of a batch after the device turned out too small for more."""
    worker: str = ""
    """Who did it."""

    @property
    def failed(self) -> int:
        """Rows with an input that could not be used; duplicates and rows with one side are not failures."""
        harmless = ("key: ", "pair: ", "note: ", "row: no ")
        return sum(count for reason, count in self.reasons.items() if not reason.startswith(harmless))


class Clock:
    """`with clock("read"): ...` adds the seconds spent to a table."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a block under `name`."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add to `name`."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
