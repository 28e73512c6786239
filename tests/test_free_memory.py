"""Read-ahead by what fits: memory that is left is the job's, not the machine's."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from tiny_store import make_card, make_store

from mmkd.base.process import _limits, _spare, free_memory
from mmkd.store import FeatureStore, reader
from mmkd.store.array import consecutive


def test_memory_is_that_of_the_smallest_group_above(tmp_path: Path) -> None:
    for folder, limit in (("job", "max"), ("job/step", "5000"), ("", "9000"), ("memory/old", "7000"), ("memory", "1")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        name = "memory.limit_in_bytes" if folder.startswith("memory") else "memory.max"
        (tmp_path / folder / name).write_text(limit + "\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    assert min(_limits(own, tmp_path)) == 5000
    own.write_text("0::/job\n")
    assert min(_limits(own, tmp_path)) == 9000
    own.write_text("9:name=systemd:/x\n4:cpu,memory:/old\n")
    assert min(_limits(own, tmp_path)) == 1
    assert _limits(tmp_path / "none", tmp_path) == [1 << 63]
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:      12 kB\n")
    assert _spare(tmp_path / "meminfo") == 12288
    assert _spare(tmp_path / "none") == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel's own word on its maps is Linux's")
@pytest.mark.parametrize(("free", "single_pages"), [(1 << 40, False), (1000, True)])
def test_a_store_larger_than_memory_is_read_by_single_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, single_pages: bool
) -> None:
    _, written = make_store(tmp_path / "s", 600, [make_card("alpha", 32)])
    monkeypatch.setattr(reader, "free_memory", lambda: free)
    image = FeatureStore.open(tmp_path / "s").image("alpha")
    flags = [
        line.split()[1:]
        for block in Path("/proc/self/smaps").read_text().split("VmFlags:")[:-1]
        if str(tmp_path / "s/teachers/alpha/image/loose") in block
        for line in Path("/proc/self/smaps").read_text().split(block, 1)[1].splitlines()[:1]
    ]
    assert len(flags) == 3
    assert all(("rr" in told) == single_pages for told in flags)  # rr: MADV_RANDOM, see proc(5)
    assert np.array_equal(consecutive(image, slice(100, 500)), written["alpha/image"][100:500])
    assert consecutive(image, slice(5, 5)).shape == (0, 32)
    assert consecutive(image, slice(0, 600, 7)).shape == (86, 32)  # not contiguous: read as it is
    assert mmap.PAGESIZE <= 256 * 32 * 2
