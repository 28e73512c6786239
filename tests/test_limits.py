"""What gives way first when a store grows: maps of a process, lists of neighbours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmkd.base.errors import UserError
from mmkd.store.array import ChunkedArray
from mmkd.store.chunk import Run, encode_chunk
from mmkd.store.encoding import ArraySpec
from mmkd.store.inspect.agreement import nearest

MAPS = Path("/proc/sys/vm/max_map_count")


@pytest.mark.skipif(not MAPS.is_file(), reason="only Linux tells how many maps a process may have")
@pytest.mark.skipif(MAPS.is_file() and int(MAPS.read_text()) > 100_000, reason="this system allows very many maps")
def test_more_shards_than_the_system_maps_is_said_in_a_line(tmp_path: Path) -> None:
    size = 16 * 64 * 4
    data, _ = encode_chunk(np.ones((16, 64), dtype=np.float32))
    (tmp_path / "c").write_bytes(data)
    stored = SimpleNamespace(root=tmp_path, spec=ArraySpec("image", "float32", 64), per_shard=16, chunk_bytes=size)
    stored.runs = lambda wanted: (Run(tmp_path / "c", 0, 1, size + 4) for _ in wanted)  # all loose, one file
    allowed = int(MAPS.read_text())

    def array(shards: int) -> ChunkedArray:
        return ChunkedArray(stored, 16 * shards, ("checksum",) * shards)  # type: ignore[arg-type]

    with pytest.raises(
        UserError, match=rf"map 65,\d+ more chunks \(vm.max_map_count is {allowed}\); pack them.*sysctl"
    ):
        array(allowed + 10).open()
    # What was mapped before the refusal is let go: the same process opens what fits.
    few = array(1000).open()
    assert np.asarray(few[15_999]).tolist() == [1.0] * 64


def test_neighbour_lists_do_not_hold_the_table_they_come_from() -> None:
    values = np.eye(50, dtype=np.float32)
    assert nearest(values, 5).base is None
