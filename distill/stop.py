"""Ending early and in order: a signal asks, the step is finished, the state is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """Which signal has asked for the end, if one has."""

    signal: signal.Signals | None = None


@contextmanager
def stop_on(names: Sequence[str]) -> Iterator[StopRequest]:
    """Note these signals instead of dying of them; a second one of the same kind acts as it always did.

    Outside the main thread nothing can be caught, and nothing is.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in names}

    def note(number: int, _: object) -> None:
        request.signal = signal.Signals(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
