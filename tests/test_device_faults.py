"""A device that dies in the middle of a run on a cluster: its shards are done by others, or the run says so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_process import tree_digest
from simulated_device import SimulatedDevice
from tiny_corpus import write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import DeviceError
from mmkd.extract.cluster import dask_client, start_workers
from mmkd.extract.cluster_config import ClusterConfig, WorkerConfig
from mmkd.extract.corpora import open_corpus
from mmkd.extract.dispatch import TeachersPlugin, gather
from mmkd.extract.plan import plan_tasks
from mmkd.extract.report import ShardReport
from mmkd.extract.run import make_store
from mmkd.extract.teachers import describe_teacher, parse_teachers
from mmkd.store import FeatureStore
from mmkd.store.writer import add_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROWS = 1024


def extracted(folder: Path, root: Path, workers: int, device: Any) -> tuple[set[int], list[str]]:
    """Shards that were done on these devices, and what was said."""
    (spec,) = parse_teachers(f"one=local-dir:{folder / 'teacher'}")
    card = describe_teacher(spec)
    store = make_store(open_corpus(str(folder / "c" / "pairs.csv")), root)
    add_teacher(store, card)
    opened, said = FeatureStore.open(root), list[str]()
    with dask_client(ClusterConfig(workers=workers)) as client:
        client.wait_for_workers(workers)
        start_workers(client, TeachersPlugin([(spec, card)], WorkerConfig(batch_rows=64), device=device))
        done = list(gather(client, store, plan_tasks(opened.record, [card], opened.ledger), said.append))
    assert all(isinstance(one, ShardReport) for one in done)
    return {one.shard for one in done}, said


def test_a_device_that_dies_leaves_its_shards_to_others(tmp_path: Path) -> None:
    write_table_corpus(tmp_path / "c", ROWS)
    write_tiny_teacher(tmp_path / "teacher", seed=1)
    marker = str(tmp_path / "taken")

    def one_dies() -> SimulatedDevice:
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            return SimulatedDevice()
        return SimulatedDevice(lost_after=3)

    assert extracted(tmp_path, tmp_path / "whole", 1, SimulatedDevice) == ({0, 1, 2, 3}, [])
    done, said = extracted(tmp_path, tmp_path / "s", 2, one_dies)
    assert done == {0, 1, 2, 3}
    (line,) = said
    assert "answers no more (CUDA error: unspecified launch failure)" in line
    assert "the other workers do its shards" in line
    assert tree_digest(tmp_path / "s") == tree_digest(tmp_path / "whole")
    with pytest.raises(DeviceError, match="answers no more"):
        extracted(tmp_path, tmp_path / "t", 2, partial(SimulatedDevice, lost_after=3))
    assert extracted_rest(tmp_path, tmp_path / "t") == tree_digest(tmp_path / "whole")


def extracted_rest(folder: Path, root: Path) -> dict[str, str]:
    """What a run on a sound device makes of a store whose run ended."""
    extracted(folder, root, 1, SimulatedDevice)
    return tree_digest(root)
