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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pairs_are_kept_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    make_linked_store(tmp_path / "store", 400_000, 1, 8)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        made, mapped = process.submit(kept_by_pairs, tmp_path / "store").result()
    files = sum(path.stat().st_size for path in (tmp_path / "run/tokens").rglob("*.bin"))
    assert files > 50e6
    assert made < 30e6
    assert mapped < 6e6
