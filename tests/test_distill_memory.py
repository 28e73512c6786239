"""Memory that a training run keeps for as long as it lasts."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from memory_peaks import kept_by_pairs

sys.path.append(str(Path(__file__).resolve().parents[1] / "build" / "types"))
pytest.importorskip("mmkd.benchmarks.linked_store", reason="benchmarks are part of the checkout")

from mmkd.benchmarks.linked_store import make_linked_store


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_finding_pairs_gives_back_what_reading_them_took(tmp_path: Path) -> None:
    make_linked_store(tmp_path / "store", 400_000, 1, 8)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        kept, used = process.submit(kept_by_pairs, tmp_path / "store").result()
    assert 56e6 < used < 88e6  # captions of 140 characters, addresses
    # 1.3 times, as 20 MB are the same for any store; 5.3 to 5.7 times where the pool keeps its pages.
    assert kept < 2 * used
