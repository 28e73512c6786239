"""Memory that importing and choosing rows take does not follow the rows of the store."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_store import make_index

from mmkd.store import FeatureStore
from mmkd.store.convert import importing, rows
from mmkd.store.errors import CorpusError
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import sample_schema
from mmkd.store.writer import create_store

SMALL, LARGE = 8_000, 80_000
GROWTH = 1 << 20
"""Bytes that ten times the rows may take more: 15 for each further row. A dict of the keys takes over 100."""


def peak(act: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy held during a call, beyond those before it."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        act()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def inputs(count: int, again: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows with keys like those of the release; the last has the key of row `again`."""
    for row in range(count):
        number = again if again is not None and row == count - 1 else row
        yield {"key": f"folder/{hashlib.sha256(str(number).encode()).hexdigest()}"}


def list_inputs(count: int) -> None:
    """List the rows of an import and let go of them."""
    with importing._spooled(inputs(count), sample_schema(())):
        pass


def test_listing_ten_times_the_rows_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_BATCH", 1024)
    monkeypatch.setattr("mmkd.store.duplicates._ROWS_A_PASS", SMALL)
    list_inputs(10)  # imports and caches
    assert peak(lambda: list_inputs(LARGE)) - peak(lambda: list_inputs(SMALL)) < GROWTH


def test_a_key_that_occurs_again_far_below_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_BATCH", 1024)
    monkeypatch.setattr("mmkd.store.duplicates._ROWS_A_PASS", 1000)
    with (
        pytest.raises(CorpusError, match=r"^key 'folder/\w{64}' names rows 7 and 4999; make the keys distinct"),
        importing._spooled(inputs(5000, again=7), sample_schema(())),
    ):
        pass


def test_choosing_by_key_among_ten_times_the_rows_takes_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for count in (SMALL, LARGE):
        corpus = CorpusRecord(kind="test", location="here", root="/", rows=count, labels=("site",), digest="d")
        create_store(tmp_path / str(count), corpus, make_index(count))
        store = FeatureStore.open(tmp_path / str(count))
        choice = rows.RowChoice(keys=["k4711", "k3", "k4711"])
        assert rows.chosen_rows(store, choice).tolist() == [4711, 3]
        peaks.append(peak(partial(rows.chosen_rows, store, choice)))
    assert peaks[1] - peaks[0] < GROWTH
