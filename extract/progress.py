"""A worker that no longer gets on ends itself, so that its shard can be done elsewhere."""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """One alarm for the process, however many shards it has in hand. It rings in a thread of C, so that a library that
    hangs with Python's lock held is ended too. A stopped process, or one that waits for a dead disk inside the kernel,
    is noticed by the scheduler's `worker-ttl` instead. `seconds`: without a beat, until the process ends."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._in_hand = 0
        # Traces of all threads are useless at a terminal.
        self._nowhere = os.open(os.devnull, os.O_WRONLY)

    @contextmanager
    def over_shard(self) -> Iterator[None]:
        """End the process if `beat` is not called for too long inside this block."""
        with self._lock:
            self._in_hand += 1
        self.beat()
        try:
            yield
        finally:
            with self._lock:
                self._in_hand -= 1
                if not self._in_hand:
                    faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Report progress and restart the timer."""
        with self._lock:
            if self._in_hand:
                faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._nowhere)
