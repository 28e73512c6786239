"""Work repeated beside a block: it comes again and again, and has ended when the block has."""

from __future__ import annotations

import threading
import time

import pytest

from mmkd.base.process import repeated


def test_work_comes_again_and_has_ended_when_the_block_has() -> None:
    calls, thrice, names = [0], threading.Event(), set()

    def work() -> None:
        calls[0] += 1
        names.add(threading.current_thread().name)
        if calls[0] == 3:
            thrice.set()

    def block() -> None:
        with repeated(work, 0.01, "beats"):
            assert thrice.wait(30)
            raise KeyError("block")

    with pytest.raises(KeyError):
        block()
    assert "beats" not in {thread.name for thread in threading.enumerate()}
    assert names == {"beats"}


def test_a_short_block_waits_for_no_call() -> None:
    calls: list[int] = []
    started = time.monotonic()
    with repeated(lambda: calls.append(1), 3600, "beats"):
        assert calls == []
    assert calls == []
    assert time.monotonic() - started < 60
    assert "beats" not in {thread.name for thread in threading.enumerate()}
