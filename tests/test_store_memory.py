"""Memory that importing and choosing rows take does not follow the rows of the store."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from memory_peaks import LARGE, SMALL, choosing_peak, inputs, listing_peak
from tiny_store import make_index

from mmkd.base.errors import CorpusError
from mmkd.store.convert import importing
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import sample_schema
from mmkd.store.writer import create_store

GROWTH = 1 << 20
"""Bytes that ten times the rows may take more: 15 for each further row. A dict of the keys takes over 100."""


@pytest.fixture
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: in this one, threads of tests before allocate too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield process


def test_listing_ten_times_the_rows_takes_no_more_memory(alone: ProcessPoolExecutor) -> None:
    small, large = alone.map(listing_peak, (SMALL, LARGE))
    assert large - small < GROWTH


def test_a_key_that_occurs_again_far_below_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_BATCH", 1024)
    monkeypatch.setattr("mmkd.base.duplicates._ROWS_A_PASS", 1000)
    with (
        pytest.raises(CorpusError, match=r"^key 'folder/\w{64}' names rows 7 and 4999; make the keys distinct"),
        importing._spool(inputs(5000, again=7), sample_schema(())),
    ):
        pass


def test_choosing_by_key_among_ten_times_the_rows_takes_no_more_memory(
    alone: ProcessPoolExecutor, tmp_path: Path
) -> None:
    for count in (SMALL, LARGE):
        corpus = CorpusRecord(kind="test", location="here", root="/", rows=count, labels=("site",), digest="d")
        create_store(tmp_path / str(count), corpus, make_index(count))
    small, large = alone.map(choosing_peak, (tmp_path / str(SMALL), tmp_path / str(LARGE)))
    assert large - small < GROWTH
