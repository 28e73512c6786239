"""Training from where a store lies: windows of shards, a bounded cache, an S3 server that is slow and fails."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import current_thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_order import joined
from slow_s3 import SlowS3, slow_s3
from tiny_corpus import picture
from tiny_run import quiet, stopped_at_first_step, write_run
from tiny_store import make_card, make_index, make_store

from mmkd.base.errors import ConfigError, StoreError, UnreachableError
from mmkd.base.places import connection
from mmkd.base.places.remote import as_root
from mmkd.distill import trainer
from mmkd.distill.checkpoint import find_checkpoint, read
from mmkd.distill.config import PolicyConfig, RunConfig, load_run
from mmkd.distill.fetch_ahead import FetchAhead, open_store
from mmkd.distill.order import Windows
from mmkd.distill.policies import make_policy
from mmkd.distill.prepare import prepare
from mmkd.distill.probe import estimate
from mmkd.distill.run import Run
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.distill.world import World
from mmkd.store import FeatureStore
from mmkd.store.cache import Cache
from mmkd.store.inputs import SCHEMA, write_inputs
from mmkd.store.stored_array import StoredArray

ROWS, SHARDS = 2000, 8
CPU = World(torch.device("cpu"))


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**40), st.data())
def test_windows_are_a_permutation_of_whole_shards(shards: int, together: int, seed: int, data: st.DataObject) -> None:
    held = data.draw(st.sets(st.integers(0, 16 * shards - 1), min_size=1))
    rows = np.array(sorted(held))
    windows, positions = Windows(rows, 16, together, seed), np.arange(len(rows))
    orders = []
    for epoch in range(2):
        places = windows.places(positions, epoch)
        assert sorted(places.tolist()) == positions.tolist()
        some = data.draw(st.lists(st.sampled_from(positions.tolist()), min_size=1, max_size=9))
        assert windows.places(np.array(some), epoch).tolist() == places[some].tolist()
        at, seen = 0, []
        while at < len(rows):
            number, end, named = windows.window(epoch, at)
            assert windows.window(epoch, end - 1)[0] == number == len(seen)
            assert set(rows[places[at:end]] // 16) == set(named)
            seen.append(len(named))
            at = end
        assert seen[:-1] == [together] * (len(seen) - 1)
        assert len(windows) == len(rows)
        orders.append(places.tolist())
    assert len(rows) < 30 or orders[0] != orders[1]


def test_windows_depend_on_the_seed_and_mix_their_shards() -> None:
    rows = np.arange(16 * 12)
    one, other = (Windows(rows, 16, 4, seed) for seed in (0, 1))
    orders = [one.places(rows, 0), one.places(rows, 1), other.places(rows, 0)]
    shards = [np.concatenate(windows.of_epoch(epoch)).tolist() for windows, epoch in ((one, 0), (one, 1), (other, 0))]
    assert [sorted(found) for found in shards] == [list(range(12))] * 3
    assert all(found != shards[number - 1] for number, found in enumerate(shards))
    for order in orders:
        for window in order.reshape(3, 64) // 16:
            # As many of each of its four shards in each half of a window, but for chance.
            assert all(2 <= (window[:32] == shard).sum() <= 14 for shard in set(window.tolist()))
    for number, order in enumerate(orders):
        assert (order == orders[number - 1]).mean() < 0.05


def test_a_cache_holds_what_was_asked_for_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", limit=250, store=12 * "0", kept=2)
    read: list[str] = []

    def fetch(name: str) -> bytes:
        file = f"alpha-image-00000-{name:0>8}"
        return cache.fetch(file, 100, lambda: read.append(name) or name.encode() * 100).read_bytes()  # type: ignore[func-returns-value]

    (tmp_path / "c/000000000000-alpha-image-of-mine").mkdir(parents=True)
    (tmp_path / "c/precious.bin").write_bytes(bytes(999))
    killed = tmp_path / f"c/.{12 * '0'}-alpha-image-00000-0000000d.node17-42-0a1b2c3d.mmkd-tmp"
    killed.write_bytes(bytes(200))
    os.utime(killed, (0, 0))

    for name in "abacab":
        assert fetch(name) == name.encode() * 100
        time.sleep(0.01)
        held = sum(path.stat().st_size for path in (tmp_path / "c").glob("0*-0000000?"))
        assert held <= 250
    assert read == ["a", "b", "c", "b"]
    with pytest.raises(StoreError, match="a file of 300 bytes is over the limit of 243"):
        cache.fetch("large", 300, lambda: bytes(300))
    assert {path.name for path in (tmp_path / "c").glob("[!.]*[!k]")} == {
        "000000000000-alpha-image-of-mine", "precious.bin",
        *(f"000000000000-alpha-image-00000-0000000{name}" for name in "ab"),
    }  # fmt: skip
    with pytest.raises(StoreError, match=r"^cannot write .*precious.bin/0{12}-x: Not a directory; make room or get"):
        replace(cache, folder=tmp_path / "c/precious.bin").fetch("x", 1, bytes)


def test_a_cache_looks_at_its_files_only_when_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, looks = Cache(tmp_path, limit=6400, store=12 * "0"), []
    shrink = Cache._shrink
    monkeypatch.setattr(Cache, "_shrink", lambda self, size: looks.append(size) or shrink(self, size))  # type: ignore[func-returns-value]

    def fetch(number: int) -> None:
        cache.fetch(f"a-image-{number:05d}-{number:08x}", 100, lambda: bytes(100))

    def held() -> list[int]:
        return sorted(int(path.name.split("-")[3]) for path in tmp_path.glob("0*-image-*[!k]"))

    for number in range(64):
        fetch(number)
    assert (len(looks), held()) == (1, list(range(64)))  # the first time nothing has been counted yet
    fetch(64)
    assert (len(looks), held()) == (2, list(range(3, 65)))
    fetch(65)
    fetch(66)
    assert (len(looks), held()) == (2, list(range(3, 67)))
    (tmp_path / ".bytes").write_bytes(b"")  # killed while it was written
    (tmp_path / f"{12 * '0'}-a-image-00010-0000000a").unlink()
    fetch(67)
    assert (len(looks), held()) == (3, [number for number in range(3, 68) if number != 10])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_is_forked_while_a_file_is_fetched_does_not_keep_its_lock(tmp_path: Path) -> None:
    cache, children = Cache(tmp_path, limit=99, store=12 * "0"), list[int]()

    def read() -> bytes:
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        children.append(child)
        return b"x"

    path = cache.fetch("alpha-image-00000-00000000", 1, read)
    try:
        with Path(f"{path}.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def index_of(rows: int) -> pa.Table:
    """So many rows with an image each."""
    index = make_index(rows)
    named = {"uri": [f"{row}.png" for row in range(rows)], "image_sha256": [f"{row:064x}" for row in range(rows)]}
    for name, values in named.items():
        index = index.set_column(index.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return index


@pytest.fixture(scope="module")
def wide_scene(training_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of eight shards with pictures, and a student."""
    root = tmp_path_factory.mktemp("wide")
    make_store(root / "features", ROWS, [make_card("alpha", 24), make_card("beta", 32)], index=index_of(ROWS))
    jpegs = []
    for number in range(16):
        buffer = io.BytesIO()
        picture(number).save(buffer, "JPEG")
        jpegs.append(buffer.getvalue())
    for shard in range(SHARDS):
        rows = range(256 * shard, min(256 * shard + 256, ROWS))
        columns = [list(rows), [f"{row:064x}" for row in rows], [jpegs[row % 16] for row in rows]]
        write_inputs(root / "features", shard, 40, pa.table(columns, schema=SCHEMA))
    (root / "tiny-student.json").write_bytes((training_scene / "tiny-student.json").read_bytes())
    return root


def put(store: Path, url: str) -> None:
    for path in store.rglob("*"):
        if path.is_file():
            (as_root(url) / str(path.relative_to(store))).write_bytes(path.read_bytes())


@pytest.fixture
def distant(
    wide_scene: Path, s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, SlowS3]]:
    """The URL of the same store, and the server."""
    put(wide_scene / "features", bucket)
    with slow_s3(s3_server) as told:
        monkeypatch.setenv("AWS_ENDPOINT_URL", told.address)
        connection.server.cache_clear()
        yield bucket, told
    connection.server.cache_clear()


def run_of(root: Path, name: str, **changes: Any) -> Path:
    """Two epochs of 15 steps in windows of one shard."""
    data = {"workers": 0, "order": "windows", "window": 1} | changes.pop("data", {})
    wanted: dict[str, Any] = {"where": "", "batch_size": 128, "data": data, "store": "features"}
    return write_run(root, name, **(wanted | changes))


def seen_by(path: Path, first: int = 0, count: int | None = None) -> list[Any]:
    """Rows, pictures and features of a run's steps."""
    seen = []
    run = prepare(load_run(path), CPU)
    with closing(run.batches), closing(run.batches.from_step(first)) as batches:
        for batch in islice(batches, count):
            parts = [batch.images, batch.tokens, batch.groups, *(p for t in batch.targets for p in (t.image, t.text))]
            seen.append(
                [batch.step, batch.rows.tolist(), *(hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in parts)]
            )
    return seen


@pytest.fixture(scope="module")
def nearby(wide_scene: Path) -> list[Any]:
    """What a run sees that reads the store on disk in the same order."""
    return seen_by(run_of(wide_scene, "nearby"))


@pytest.mark.integration
def test_a_store_behind_a_url_gives_the_batches_of_the_same_on_disk_and_fetches_each_byte_once(
    wide_scene: Path, tmp_path: Path, distant: tuple[str, SlowS3], nearby: list[Any]
) -> None:
    url, told = distant
    changes = {"store": url, "data": {"cache": str(tmp_path / "cache"), "cache_gb": 0.0025, "workers": 2}}
    path = run_of(wide_scene, "distant", **changes)
    prepare(load_run(path), CPU)  # writes the pairs, which reads sample parts and `valid`
    told.sent.clear()
    assert seen_by(path) == nearby
    teachers = {name: size for name, size in told.sent.items() if "/inputs/" in name or "/loose/" in name}
    whole = {name: size for name, size in teachers.items() if not name.endswith(".json")}
    stored = sum(p.stat().st_size for p in (wide_scene / "features/inputs").glob("*.arrow"))
    stored += sum(
        p.stat().st_size for p in (wide_scene / "features").glob("teachers/*/*/loose/*") if "valid" not in str(p)
    )
    assert stored > 2.5e6  # so that the second epoch does not find it all there
    assert 1.1 * stored < sum(whole.values()) <= 2 * 1.05 * stored
    files = [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]
    assert sum(p.stat().st_size for p in files) <= 2.5e6
    # Stopped in the middle of a window and gone on with.
    assert seen_by(path, 6, 4) == nearby[6:10]


@pytest.mark.integration
def test_features_behind_a_url_are_not_made_resident(
    wide_scene: Path, distant: tuple[str, SlowS3], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeacherFeatures, "fits", lambda *_: True)
    for name, store, resident in (("fitting-url", distant[0], False), ("fitting-disk", "features", True)):
        run = prepare(load_run(run_of(wide_scene, name, store=store)), CPU)
        run.batches.close()
        assert run.batches.teachers is not None
        assert (run.batches.teachers.resident_bytes > 0) == resident


@pytest.mark.integration
def test_views_and_captions_behind_a_url_are_those_of_the_same_store_on_disk(
    rich_scene: Path, tmp_path: Path, distant: tuple[str, SlowS3]
) -> None:
    bucket, told = distant
    put(rich_scene / "rich", url := f"{bucket}/rich")
    data: dict[str, Any] = {"views": True, "unpaired": True, "cache": str(tmp_path / "cache")}
    changes: dict[str, Any] = {
        "batch_size": 32,
        "policy": {"kind": "best", "by": "corpus"},
        "loss": {"relational": 1.0},
    }
    path, by = run_of(rich_scene, "rich-distant", store=url, data=data, **changes), set()
    read_chunk = StoredArray.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredArray, "read", lambda *of: by.add(current_thread().name[:11]) or read_chunk(*of))
        prepare(load_run(path), CPU)  # writes the pairs
    assert by == {"mmkd-remote", "mmkd-fetch_"}  # many at a time
    shutil.rmtree(tmp_path / "cache")
    told.sent.clear()
    found = seen_by(path)
    assert found == seen_by(run_of(rich_scene, "rich-nearby", store="rich", data=data, **changes))
    assert len(found) == 16
    chunks = {path.name: path.stat().st_size for path in (tmp_path / "cache").glob("[!.]*[!k]")}
    # Two shards of rows and two of views, or one of captions, of two teachers.
    assert len(chunks) == 2 * (4 + 3)
    assert sum(size for name, size in told.sent.items() if "/loose/" in name) == sum(chunks.values()) + 4 * len(chunks)
    line = r"up to 6 windows of 1 shards are in use at a time with their views and further captions, 0\.000201 GB"
    with pytest.raises(ConfigError, match=line):
        prepare(load_run(run_of(rich_scene, "rich-small", store=url, data=data | {"cache_gb": 0.0001}, **changes)), CPU)


@pytest.mark.slow
def test_ranks_behind_a_url_see_the_same_samples_and_share_the_cache(
    wide_scene: Path, tmp_path: Path, distant: tuple[str, SlowS3]
) -> None:
    url, told = distant
    steps, sent = {}, {}
    for ranks in (1, 2):
        data = {"cache": str(tmp_path / f"cache-{ranks}"), "workers": 0}
        path = run_of(wide_scene, f"ranks-{ranks}", store=url, epochs=1, data=data)
        told.sent.clear()
        launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        # Processes of their own: a forked one lacks the threads by which this one has written to the server.
        command = [*launcher, str(Path(__file__).parent / "rank_order.py"), str(path), "0", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        steps[ranks] = joined(tmp_path, ranks)
        sent[ranks] = sum(size for name, size in told.sent.items() if "loose" in name or name.endswith(".arrow"))
    assert steps[1] == steps[2]
    assert sent[2] == pytest.approx(sent[1], rel=0.01)


@pytest.mark.integration
@pytest.mark.parametrize("fault", ["fail", "stall"])
def test_a_server_that_fails_once_is_asked_again_and_one_that_keeps_failing_is_one_line(
    wide_scene: Path, distant: tuple[str, SlowS3], nearby: list[Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    url, told = distant
    monkeypatch.setattr(connection, "_STALLED", "1s")
    connection.server.cache_clear()
    failed: set[str] = set()

    def once(name: str) -> str:
        if "loose" not in name or name in failed or len(failed) > 2:
            return ""
        failed.add(name)
        return fault

    path = run_of(wide_scene, f"faulty-{fault}", store=url)
    run = prepare(load_run(path), CPU)
    with closing(run.batches), closing(run.batches.from_step(0)) as batches:
        for _ in range(3):
            next(batches)
    told.fault = once
    assert seen_by(run_of(wide_scene, f"again-{fault}", store=url)) == nearby
    assert failed
    told.fault = lambda name: "fail" if "alpha/image/loose" in name else ""
    with pytest.raises(UnreachableError, match=r"loose.* cannot be used: 500 Internal Server Error") as caught:
        seen_by(run_of(wide_scene, f"ended-{fault}", store=url))
    assert "\n" not in str(caught.value)


@pytest.mark.integration
def test_a_run_that_a_server_ended_goes_on_to_the_same_weights(wide_scene: Path, distant: tuple[str, SlowS3]) -> None:
    url, told = distant
    quiet(run_of(wide_scene, "whole", epochs=1))
    path = run_of(wide_scene, "ended", store=url, epochs=1, checkpoints={"every_steps": 3})
    stopped_at_first_step(path)
    told.fault = lambda name: "fail" if name.endswith(("00003", "00005")) else ""
    with pytest.raises(UnreachableError):
        quiet(path)
    told.fault = lambda name: ""
    report = quiet(path)
    assert report.resumed_at > 0
    one, other = (
        read(find_checkpoint(load_run(wide_scene / f"{name}.yaml").out, "last")) for name in ("whole", "ended")
    )
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_random_orders_banks_and_small_caches_are_refused(wide_scene: Path, distant: tuple[str, SlowS3]) -> None:
    url, _ = distant
    with pytest.raises(ConfigError, match=r"data\.order shuffled reads random rows; set data\.order to windows, or"):
        prepare(load_run(run_of(wide_scene, "random", store=url, data={"order": "shuffled"})), CPU)
    with pytest.raises(ConfigError, match=r"up to 5 windows of 1 shards are in use at a time, 0\.00"):
        prepare(load_run(run_of(wide_scene, "small", store=url, data={"cache_gb": 0.0001})), CPU)
    bank = {"bank": 1.0, "bank_rows": {"size": 50, "refresh": 9}}
    with pytest.raises(ConfigError, match=r"loss\.bank reads rows of the whole store"):
        load_run(run_of(wide_scene, "bank", loss=bank))
    with pytest.raises(
        ConfigError, match=r"^data\.features: resident reads all of .*, which is behind a URL; leave it out"
    ):
        prepare(load_run(run_of(wide_scene, "resident", store=url, data={"features": "resident"})), CPU)
    held_out = {"sets": [{"name": "held", "where": "site = 's1'"}]}
    with pytest.raises(ConfigError, match="monitor set 'held': its images lie all over"):
        prepare(
            load_run(run_of(wide_scene, "held", store=url, where="site = 's0'", batch_size=24, monitor=held_out)), CPU
        )


def test_a_dry_run_writes_nothing_to_the_runs_folder(wide_scene: Path, distant: tuple[str, SlowS3]) -> None:
    config = load_run(run_of(wide_scene, "dry", store=distant[0]))
    found = estimate(config, say=lambda _: None)
    assert found is not None
    assert found.rows == {"pair": ROWS}
    assert not config.out.exists()


def test_a_dry_run_fetches_into_the_cache_that_is_named(
    wide_scene: Path, tmp_path: Path, distant: tuple[str, SlowS3]
) -> None:
    for data, folder in (({}, tmp_path / "dry/cache"), ({"cache": str(tmp_path / "mine")}, tmp_path / "mine")):
        store = open_store(load_run(run_of(wide_scene, "dry-named", store=distant[0], data=data)), tmp_path / "dry")
        assert store.cache is not None
        assert store.cache.folder == folder


def test_nothing_is_fetched_any_more_where_reading_ahead_failed() -> None:
    asked: list[int] = []

    def fetch(shard: int) -> None:
        asked.append(shard)
        if shard == 1:
            raise UnreachableError("gone")
        time.sleep(0.2)

    ahead: Any = object.__new__(FetchAhead)
    ahead._pool = ThreadPoolExecutor(2)
    ahead._arrays = {"image": [SimpleNamespace(fetch=fetch, checksums="abc")], "text": []}
    ahead._beside = {"image": {0: [2]}, "text": {}}  # what policies look at is no view
    ahead.read(np.array([0]))
    assert asked == [0]
    with pytest.raises(UnreachableError, match="gone"):
        ahead.read(np.array([1, 0]))
    assert not any(thread.is_alive() for thread in ahead._pool._threads)


def test_training_that_fails_or_ends_fetches_nothing_more(wide_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    def refuse(*_: object) -> Iterator[torch.Tensor]:
        raise OSError("no more processes")

    def make(config: RunConfig, world: World) -> Run:
        run = prepare(config, world)
        ahead: Any = SimpleNamespace(close=lambda: closed.append(1))
        return replace(run, batches=replace(run.batches, ahead=ahead, pictures=refuse))

    monkeypatch.setattr(trainer, "prepare", make)
    with pytest.raises(OSError, match="no more processes"):
        trainer.train(load_run(run_of(wide_scene, "closed")), lambda line: None)
    assert closed == [1]


@pytest.mark.parametrize("by", ["caption", "corpus"])
def test_a_teacher_without_features_in_the_first_window_is_judged_by_the_window_where_it_has_most(
    training_scene: Path, tmp_path: Path, by: str
) -> None:
    cards = [make_card("alpha", 24), make_card("beta", 32)]
    make_store(tmp_path / "features", 4 * 256, cards, index=index_of(4 * 256))
    (tmp_path / "tiny-student.json").write_bytes((training_scene / "tiny-student.json").read_bytes())
    every = Windows(np.arange(4 * 256), 256, 1, 0).of_epoch(0)
    first, second, other, last = (int(shards[0]) for shards in every)
    for shard in (first, second, last):
        (tmp_path / f"features/ledger/{shard:05d}.beta.json").unlink()
    policy = {"kind": "best", "by": by}
    ready = prepare(load_run(run_of(tmp_path, "judged", policy=policy)), CPU)
    side, rows = ready.update.model.objective.side, np.arange(4 * 256).reshape(4, 256)
    assert side is not None
    teachers = TeacherFeatures(FeatureStore.open(tmp_path / "features"), ("alpha", "beta"))
    seen = rows[sorted((first, other))].ravel()
    expected = make_policy(PolicyConfig.model_validate(policy), 0, teachers, seen, np.stack([seen] * 2, 1), CPU.device)
    assert side.policy.standard is not None
    assert expected.standard is not None
    assert side.policy.standard.mean.tolist() == expected.standard.mean.tolist()
    assert side.policy.standard.deviation.tolist() == expected.standard.deviation.tolist()
    assert expected.standard.deviation[1] != 1  # measured


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.integration
def test_a_full_cache_disk_is_one_line(wide_scene: Path, tmp_path: Path, distant: tuple[str, SlowS3]) -> None:
    url, _ = distant
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)], check=False)
    if done.returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(StoreError, match=r"cannot write .*: No space left on device; make room") as caught:
            seen_by(run_of(wide_scene, "full", store=url, data={"cache": str(small)}))
        assert "\n" not in str(caught.value)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_damaged_files_of_the_cache_are_fetched_again(
    wide_scene: Path, tmp_path: Path, distant: tuple[str, SlowS3], nearby: list[Any]
) -> None:
    url, _ = distant
    path = run_of(wide_scene, "damaged", store=url, data={"cache": str(tmp_path / "cache")})
    assert seen_by(path, 0, 2) == nearby[:2]
    held = {part: sorted((tmp_path / "cache").glob(f"*-{part}-*[!k]")) for part in ("image", "inputs", "valid")}
    assert [len(files) > 0 for files in held.values()] == [True, True, False]
    for number, file in enumerate([*held["image"], *held["inputs"]]):
        file.write_bytes(file.read_bytes()[:-9] if number % 2 else b"x" + file.read_bytes()[1:])
    assert seen_by(path, 0, 2) == nearby[:2]
