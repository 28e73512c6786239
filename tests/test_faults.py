"""What goes wrong on a cluster, really done: kills, hangs, full disks, crashing images. After each: the same bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from cluster_processes import scheduler_and_worker, workers_of
from extract_scene import ROWS, Scene, children, ended, entries, kill_session, rows_done, settings, started, wait_for

from mmkd.store import FeatureStore

SHARD = 256
pytestmark = pytest.mark.timeout(900)


def finish(scene: Scene, store: Path) -> None:
    """Run again after a fault: it ends well, with the bytes of a run that nothing happened to."""
    done = ended(scene.command(store, "--workers", 1))
    assert done.returncode == 0, done.stderr
    assert scene.same(store)
    assert not [path for path in store.parent.glob(f".{store.name}.*") if path.name.startswith(".store.0")]


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@pytest.mark.integration
@pytest.mark.parametrize("seed", SEEDS)
def test_kill_9_of_a_worker(scene: Scene, tmp_path: Path, seed: int) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    chance = random.Random(seed)
    run = started(scene.command(store, "--workers", 2), log)
    wait_for(lambda: entries(store) >= chance.randint(1, 3), run, log)
    time.sleep(chance.random() / 2)
    pids = workers_of(run)
    assert len(pids) == 2
    os.kill(chance.choice(pids), signal.SIGKILL)
    assert run.wait(timeout=600) == 0, log.read_text()
    assert scene.same(store)
    assert f"rows: {ROWS:,} ok" in log.read_text()
    # One shard was in hand, if that: it was done again, and nothing else was.
    assert ROWS <= rows_done(store) <= ROWS + SHARD
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(10)])
def test_kill_9_of_the_client(scene: Scene, tmp_path: Path, seed: int) -> None:
    """The scheduler of a local cluster lives in it; the workers must not outlive it."""
    store, log = tmp_path / "store", tmp_path / "log"
    chance = random.Random(seed)
    run = started(scene.command(store, "--workers", 2), log)
    # From before the index is written to the last shard.
    after = chance.choice([0, 0, 1, 2, 4, 6])
    wait_for(lambda: run.poll() is not None or (entries(store) >= after and log.stat().st_size > 0), run, log)
    time.sleep(chance.random())
    pids = children(run.pid)
    run.kill()
    run.wait()
    finished, read = entries(store), rows_done(store)
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its client"
        time.sleep(0.1)
    finished = entries(store)
    finish(scene, store)
    assert read <= finished * SHARD
    assert rows_done(store) - read == ROWS - finished * SHARD


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(10)])
def test_kill_9_of_the_scheduler(scene: Scene, tmp_path: Path, seed: int) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    chance = random.Random(seed)
    with scheduler_and_worker(tmp_path) as (address, scheduler, _):
        run = started(scene.command(store, "--scheduler", address), log)
        wait_for(lambda: entries(store) >= chance.randint(1, 4), run, log)
        time.sleep(chance.random() / 2)
        kill_session(scheduler)
        assert run.wait(timeout=600) == 1, log.read_text()
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == [lines[-1]], log.read_text()
    assert "went away" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert entries(store) < ROWS // SHARD, "the kill came too late to prove anything"
    finish(scene, store)


@pytest.mark.slow
def test_two_clients_on_one_store(scene: Scene, tmp_path: Path) -> None:
    store = tmp_path / "store"
    logs = [tmp_path / "log0", tmp_path / "log1"]
    runs = [started(scene.command(store, "--workers", 1), log) for log in logs]
    told = {run.wait(timeout=600): log.read_text() for run, log in zip(runs, logs, strict=True)}
    # One made the store and does it; the other one is told so and has touched nothing.
    assert sorted(told) == [0, 1], told
    (line,) = (line for line in told[1].splitlines() if line.startswith("Error: "))
    assert f"{store} is being written by `mmkd extract` (process {runs[0].pid} on " in line or str(runs[1].pid) in line
    assert scene.same(store)
    assert FeatureStore.open(store).verify(deep=True).sound
    assert list(tmp_path.glob(".store*")) == []


@pytest.mark.slow
def test_a_worker_that_is_stopped(scene: Scene, tmp_path: Path) -> None:
    """SIGSTOP stands for a machine that freezes: no heartbeat, so the scheduler gives its shard to another."""
    store, log = tmp_path / "store", tmp_path / "log"
    cluster = settings(tmp_path, distributed={"scheduler": {"worker-ttl": "40s"}})
    run = started(scene.command(store, "--workers", 2, "--scheduler", cluster), log)
    wait_for(lambda: entries(store) >= 1, run, log)
    stopped = workers_of(run)[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert run.wait(timeout=600) == 0, log.read_text()
    finally:
        kill_session(run)
    assert scene.same(store)


def poisoned(scene: Scene, folder: Path, poison: str) -> tuple[Path, dict[str, str]]:
    """A small corpus whose 40th image is marked, and an environment in which Pillow meets it as `poison` says."""
    corpus = folder / "corpus"
    (corpus / "images").mkdir(parents=True)
    lines = scene.table.read_text().splitlines()[: 2 * SHARD + 1]
    (corpus / "pairs.csv").write_text("\n".join(lines) + "\n")
    for number in range(2 * SHARD):
        os.link(scene.table.parent / "images" / f"{number}.png", corpus / "images" / f"{number}.png")
    bad = corpus / "images" / "40.png"
    data = bad.read_bytes()
    bad.unlink()
    bad.write_bytes(data + b"POISON")
    # The decoder itself fails, inside Pillow, in whatever process meets the picture.
    (folder / "sitecustomize.py").write_text(
        "import os, time\n"
        "from PIL import PngImagePlugin as p\n"
        "load = p.PngImageFile._open\n"
        "def _open(self):\n"
        "    data = self.fp.read(); self.fp.seek(0)\n"
        f"    if data.endswith(b'POISON'): {poison}\n"
        "    load(self)\n"
        "p.PngImageFile._open = _open\n"
    )
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return corpus / "pairs.csv", os.environ | {"PYTHONPATH": path}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        ("os.abort()", "image: the decoder crashed on it (SIGABRT)"),
        ("time.sleep(1000)", "image: reading or decoding takes more than 10 seconds"),
    ],
)
def test_an_image_that_takes_its_process_down(scene: Scene, tmp_path: Path, poison: str, reason: str) -> None:
    table, environment = poisoned(scene, tmp_path, poison)
    store = tmp_path / "store"
    cluster = settings(tmp_path, workers=2, worker={"hang_seconds": 20})
    command = Scene(table, scene.teacher, scene.store).command(store, "--scheduler", cluster)
    done = ended(command, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shard 0 was in hand when its workers died" in done.stdout
    rows = FeatureStore.open(store).sample_table(columns=["row", "status", "reason"]).to_pylist()
    assert [row for row in rows if row["status"] != "ok"] == [{"row": 40, "status": "partial", "reason": reason}]
    assert FeatureStore.open(store).verify(deep=True).sound
    assert "Traceback" not in done.stderr
    # Once the decoder is mended, only this row is read again, and nothing tells that it ever failed.
    mended = ended([*command, "--failures", "retry"])
    assert mended.returncode == 0, mended.stderr
    fresh = tmp_path / "fresh"
    assert ended(Scene(table, scene.teacher, scene.store).command(fresh, "--workers", 1)).returncode == 0
    from in_process import tree_digest

    assert tree_digest(store) == tree_digest(fresh)
    assert rows_done(store) == 2 * SHARD + 1


@pytest.mark.slow
def test_a_full_disk_in_the_middle(scene: Scene, tmp_path: Path) -> None:
    """A limit on file size comes down on the running workers: chunks no longer fit."""
    store, log = tmp_path / "store", tmp_path / "log"
    run = started(scene.command(store, "--workers", 1), log)
    wait_for(lambda: entries(store) >= 2, run, log)
    for pid in children(run.pid):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    assert run.wait(timeout=600) == 1, log.read_text()
    errors = [line for line in log.read_text().splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "cannot write" in errors[0]
    assert "Traceback" not in log.read_text()
    assert 2 <= entries(store) < 8
    finish(scene, store)


@pytest.mark.slow
def test_a_store_made_read_only_in_the_middle(scene: Scene, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    # Root writes where it may not, unless it gives that right up.
    rights = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    if prefix and not shutil.which("setpriv"):
        pytest.skip("as root this needs setpriv")
    run = started([*prefix, *scene.command(store, "--workers", 1)], log)
    wait_for(lambda: entries(store) >= 2, run, log)
    folders = [store, *(path for path in store.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    assert run.wait(timeout=600) == 1, log.read_text()
    assert "Error: cannot write" in log.read_text()
    assert "Traceback" not in log.read_text()
    for folder in folders:
        folder.chmod(0o777)
    finish(scene, store)


@pytest.mark.slow
def test_a_run_with_too_many_failures_stops(scene: Scene, tmp_path: Path) -> None:
    table, _ = poisoned(scene, tmp_path, "pass")
    for number in range(20):
        image = table.parent / "images" / f"{number}.png"
        image.unlink()
    command = Scene(table, scene.teacher, scene.store).command(tmp_path / "store", "--workers", 1, "--failures")
    done = ended([*command, "2%"])
    assert done.returncode == 1
    assert "20 of 256 rows failed, more than --failures 2% (20 x image: file not found)" in done.stderr
    assert done.stderr.count("Error: ") == 1
    assert "extracted" not in done.stdout
    assert 1 <= entries(tmp_path / "store") <= 2  # what was in hand may end
    assert ended([*command, "20"]).returncode == 0
    assert entries(tmp_path / "store") == 2
