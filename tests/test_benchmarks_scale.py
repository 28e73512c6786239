"""The simulations are what they say: linked stores are sound, sleeping workers get every task once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build" / "types"))
pytest.importorskip("mmkd.benchmarks.result", reason="benchmarks are part of the checkout")

from mmkd.benchmarks import original, released_layout, scale, scheduler  # noqa: E402
from mmkd.benchmarks.linked_store import make_linked_store  # noqa: E402
from mmkd.store import FeatureStore  # noqa: E402
from mmkd.store.convert.importing import import_features  # noqa: E402
from mmkd.store.convert.original import OriginalRelease  # noqa: E402


def test_a_linked_store_is_sound_and_takes_the_room_of_two_packs(tmp_path: Path) -> None:
    record = make_linked_store(tmp_path / "store", 1300, 2, 16)
    assert (record.rows_per_shard, record.shards_per_pack) == (256, 32)
    store = FeatureStore.open(tmp_path / "store")
    report = store.verify(deep=True)
    assert report.sound
    assert (report.entries, report.orphans) == (12, ())
    assert np.array_equal(store.image("t0")[:256], store.image("t0")[1024:1280], equal_nan=True)
    assert not np.array_equal(store.image("t0")[:20], store.image("t0")[1280:1300], equal_nan=True)
    packs = [path.stat().st_ino for path in (tmp_path / "store" / "teachers").rglob("c/**/*") if path.is_file()]
    assert (len(packs), len(set(packs))) == (6, 3)
    many = make_linked_store(tmp_path / "many", 256 * 69 + 7, 2, 16, workers=16)
    assert many.rows_per_shard == 256
    assert FeatureStore.open(tmp_path / "many").verify(deep=True).sound
    packs = [path.stat().st_ino for path in (tmp_path / "many" / "teachers").rglob("c/**/*") if path.is_file()]
    assert (len(packs), len(set(packs))) == (2 * 3 * -(-70 // many.shards_per_pack), 3)
    assert 0.95 < store.available().mean() < 1


def test_the_ideal_makespan_gives_each_task_to_the_worker_that_is_free_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tasks = scheduler.tasks_of(5 * 16_384)
    monkeypatch.setattr(scheduler, "task_seconds", lambda shard, mean: [3.0, 1.0, 1.0, 2.0, 2.0][shard])
    assert scheduler.ideal_seconds(tasks, 1, 0) == 9
    assert scheduler.ideal_seconds(tasks, 2, 0) == 5  # 3 + 2 beside 1 + 1 + 2
    assert scheduler.ideal_seconds(tasks, 512, 0) == 3


def test_sleeping_workers_do_every_task_of_the_real_plan() -> None:
    record, tasks = scheduler.tasks_of(scheduler.ROWS)
    assert (len(tasks), record.rows_per_shard) == (178, 16_384)
    assert len(scheduler.tasks_of(scheduler.ROWS, 512)[1]) == 2833
    with scheduler.cluster_of(4) as client:
        seconds, cpu, _, done = scheduler.run(client, 20 * 16_384, 0.05)
    assert (done, cpu > 0) == (20, True)
    ideal = scheduler.ideal_seconds(tasks[:20], 4, 0.05)
    assert seconds > 0.9 * ideal


@pytest.mark.integration
def test_the_released_resume_repeats_the_first_half_and_ours_nothing(tmp_path: Path) -> None:
    assert original.resumed_as_released(10, 5) == (5, 5)
    assert original.resumed_as_released(10, 0) == (0, 0)
    released_layout.write_release(tmp_path / "release", 300)
    source = OriginalRelease(tmp_path / "release", "clips_project_output")
    import_features(source, tmp_path / "store", "float16", lambda done, every: None)
    store = FeatureStore.open(tmp_path / "store")
    plan = original.plan_of(original.TeacherFeatures(store, tuple(store.teachers)))
    assert plan.schedule.steps_per_epoch == 2
    assert original.resumed_as_ours(plan, 1) == (0, 0)
    # The data are the same: what the loader's file holds is what the store holds, to float16.
    rows = released_layout.ReleasedRows(tmp_path / "release", images=False)
    line = rows.lines[7]
    _, image, _ = rows[7]
    held = [np.asarray(store.image(name.lower())[7], dtype=np.float32) for name in line["available_clips"]]
    assert any(np.allclose(image.numpy(), values, atol=4e-3) for values in held)
    missing = {name.lower() for name in released_layout.WIDTHS} - {name.lower() for name in line["available_clips"]}
    assert all(np.isnan(store.image(slug)[7]).all() for slug in missing)


def test_a_resumed_run_is_measured_on_the_rows_of_the_run_without_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "BATCH", 64)
    make_linked_store(tmp_path / "store", 1300, 2, 16)
    for act in (scale.begin, scale.epoch, scale.resume, scale.open_first_batch, scale.verify_all, scale.info):
        seconds, memory, _ = act(tmp_path / "store")
        assert seconds > 0
        assert memory < 1000
