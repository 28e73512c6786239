"""Small work that is repeated in a thread beside a block: beats of a lock, requests for jobs that have ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(work: Callable[[], object], seconds: float, name: str) -> Iterator[None]:
    """Call `work` every so many seconds while the block runs; its last call has returned when the block is left.

    Args:
        work: the first call comes after the first wait. An exception ends the repetition, not the block.
        seconds: between the end of a call and the next one.
        name: of the thread.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
