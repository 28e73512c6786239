"""`mmkd store pull`: all of a store or a part, killed and resumed, and sources that are not what they should be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from tiny_store import make_card, make_selection, make_store

from mmkd.base.errors import CorruptStoreError, StoreError
from mmkd.base.files import write_atomically
from mmkd.base.places.remote import StorePath, as_root
from mmkd.cli.main import cli
from mmkd.store import FeatureStore, UserError, stored_array
from mmkd.store.fold import fold
from mmkd.store.inputs import Inputs, write_inputs
from mmkd.store.ledger import read_ledger, remove_entry, write_entry
from mmkd.store.pull import pull, shard_range
from mmkd.store.record import Store
from mmkd.store.samples import read_part
from mmkd.store.verify import verify

CARDS = [make_card("alpha", 8), make_card("beta", 16).with_encoding("int8")]


@pytest.fixture(scope="module", params=["disk", "s3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StorePath:
    """900 rows in four shards of 256."""
    local = tmp_path_factory.mktemp("source") / "store"
    store, _ = make_store(local, 900, CARDS)
    for shard in (0, 2):  # two shards keep training inputs
        rows, _ = read_part(local, shard)
        jpegs = pa.array([b"jpeg %d" % row for row in rows["row"].to_pylist()], pa.large_binary())
        columns = {"row": rows["row"], "image_sha256": rows["image_sha256"], "jpeg": jpegs}
        write_inputs(local, shard, 32, pa.table(columns))
    kept = np.random.default_rng(0).random((900, 2)) < 0.5
    make_selection(store, "half", kept, CARDS)
    fold(store)
    assert verify(local, deep=True).sound
    if request.param == "disk":
        return local
    request.getfixturevalue("s3_server")
    root = as_root("s3://shared/pull/store")
    for name, data in files(local).items():
        write_atomically(root / name[1:], data)
    return root


def mmkd_pull(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["store", "pull", *map(str, arguments)])


def files(root: StorePath) -> dict[str, bytes]:
    return {str(path)[len(str(root)) :]: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def bring(root: StorePath | str, out: Path, teachers: list[str] | None = None, shards: range | None = None) -> int:
    store = FeatureStore.open(root)
    return pull(store, out, teachers=teachers, shards=shards, workers=4, progress=lambda *_: None).shards


def test_a_pulled_store_is_the_store_byte_for_byte(source: StorePath, tmp_path: Path) -> None:
    done = mmkd_pull(source, tmp_path / "out", "--json")
    report = json.loads(done.output)
    assert (report["rows"], report["parts"], report["shards"], report["present"]) == (900, 4, 8, 0)
    there = files(source)
    assert files(tmp_path / "out") == there
    assert (report["inputs"], report["selections"]) == (2, 1)
    counted = [4 * (spec.chunk_bytes(256) + 4) for card in CARDS for spec in card.arrays]
    counted += [len(data) for name, data in there.items() if name.endswith((".parquet", ".arrow"))]
    assert report["bytes"] == sum(counted) + 2 * 900  # a selection counts its values
    pulled = FeatureStore.open(tmp_path / "out")
    assert pulled.verify(deep=True).sound
    assert np.array_equal(pulled.available("half"), FeatureStore.open(source).available("half"))
    assert bytes(Inputs(pulled).jpeg(513)) == b"jpeg 513"
    again = json.loads(mmkd_pull(source, tmp_path / "out", "--json").output)
    assert (again["parts"], again["shards"], again["present"], again["bytes"]) == (0, 0, 8, 0)


def test_a_part_is_a_sound_store_and_grows(source: StorePath, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert mmkd_pull(source, out, "--teachers", "beta", "--shards", "1:3").exit_code == 0
    part, whole = FeatureStore.open(out), FeatureStore.open(source)
    assert list(part.teachers) == ["beta"]
    assert part.verify(deep=True).sound
    assert part.sample_table().equals(whole.sample_table())
    assert np.flatnonzero(part.available()[:, 0]).tolist() == list(range(256, 768))
    assert np.array_equal(part.image("beta")[256:768], whole.image("beta")[256:768])
    assert np.isnan(part.image("beta")[:256]).all()
    assert part.summary().teachers["beta"].shards_done == 2
    assert not part.summary().complete
    assert bring(source, out) == 6
    assert files(out) == files(source)


def test_what_was_damaged_on_disk_is_brought_again(source: StorePath, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bring(source, out)
    pack, part = out / "teachers/alpha/text/c/0/0", out / "samples/00003.parquet"
    data = bytearray(pack.read_bytes())
    data[2 * 256 * 8 * 2 + 7] ^= 1  # of shard 2
    pack.write_bytes(data)
    part.write_bytes(b"PAR1")
    entry = read_ledger(out)[0, "beta"]
    remove_entry(out, 2, "alpha")
    remove_entry(out, 0, "beta")
    write_entry(out, entry.model_copy(update={"image_rows": 255}))
    assert bring(source, out) == 2
    assert files(out) == files(source)


def test_a_selection_stays_behind_with_its_teachers(source: StorePath, tmp_path: Path) -> None:
    report = json.loads(mmkd_pull(source, tmp_path / "out", "--teachers", "beta", "--json").output)
    assert report["selections"] == 0
    assert FeatureStore.open(tmp_path / "out").verify(deep=True).sound
    assert json.loads(mmkd_pull(source, tmp_path / "out", "--json").output)["selections"] == 1


def test_inputs_are_left_out_when_asked_checked_and_mended(source: StorePath, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert json.loads(mmkd_pull(source, out, "--no-inputs", "--json").output)["inputs"] == 0
    assert not (out / "inputs").exists()
    assert json.loads(mmkd_pull(source, out, "--shards", "1:3", "--json").output)["inputs"] == 1  # shard 2
    assert [path.name for path in sorted((out / "inputs").iterdir())] == ["00002.arrow", "00002.json"]
    path = out / "inputs/00002.arrow"
    sound = path.read_bytes()
    path.write_bytes(sound[:200] + bytes([sound[200] ^ 1]) + sound[201:])
    report = json.loads(mmkd_pull(source, out, "--json").output)
    assert (report["inputs"], report["shards"]) == (2, 0)
    assert path.read_bytes() == sound


def test_damaged_inputs_and_another_selection_are_named(tmp_path: Path) -> None:
    local = tmp_path / "local"
    make_store(local, 300, CARDS[:1])
    rows, _ = read_part(local, 0)
    jpegs = pa.array([b"x"] * len(rows), pa.large_binary())
    columns = {"row": rows["row"], "image_sha256": rows["image_sha256"], "jpeg": jpegs}
    write_inputs(local, 0, 32, pa.table(columns))
    arrow = local / "inputs/00000.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-1] + b"!")
    done = mmkd_pull(local, tmp_path / "out")
    assert done.exit_code == 1
    assert "not the bytes that its entry vouches for; everything else was copied" in str(done.exception)
    assert FeatureStore.open(tmp_path / "out").verify(deep=True).sound
    (local / "inputs/00000.json").unlink()
    for root, value in ((local, True), (tmp_path / "out", False)):
        make_selection(Store.open(root), "one", np.full((300, 1), value), CARDS[:1])
    assert "has another selection 'one'; delete it there" in str(mmkd_pull(local, tmp_path / "out").exception)


@pytest.mark.integration
@pytest.mark.parametrize(("damage", "words"), [("flip", "CRC32C"), ("cut", "bytes, expected"), ("drop", "missing")])
def test_a_damaged_source_is_named_and_the_rest_is_brought(
    bucket: str, tmp_path: Path, damage: str, words: str
) -> None:
    root = as_root(bucket)
    make_store(root, 600, CARDS)
    path = root / "teachers/beta/image_scale/loose/00001"
    data = path.read_bytes()
    if damage == "drop":
        path.unlink()
    else:
        write_atomically(path, data[:-7] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    done = mmkd_pull(root, tmp_path / "out")
    assert isinstance(done.exception, CorruptStoreError)
    assert "teachers/beta/image_scale/loose/00001" in str(done.exception)
    assert words in str(done.exception)
    out = FeatureStore.open(tmp_path / "out")
    assert sorted(set(FeatureStore.open(root).ledger) - set(out.ledger)) == [(1, "beta")]
    assert out.verify(deep=True).sound
    write_atomically(path, data)
    assert bring(root, tmp_path / "out") == 1


def test_a_changed_sample_part_is_named(bucket: str, tmp_path: Path) -> None:
    root = as_root(bucket)
    make_store(root, 300, CARDS[:1])
    write_atomically(root / "samples/00001.parquet", (root / "samples/00000.parquet").read_bytes())
    with pytest.raises(CorruptStoreError, match=r"samples/00001\.parquet is not the sample part"):
        bring(root, tmp_path / "out")


def test_a_strange_target_is_refused(source: StorePath, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"not empty \(found notes.txt\)"):
        bring(source, tmp_path / "full")
    with pytest.raises(StoreError, match="not empty"):
        bring(source, tmp_path / "full/notes.txt")
    make_store(tmp_path / "other", 300, CARDS)
    before = files(tmp_path / "other")
    with pytest.raises(StoreError, match="holds another store"):
        bring(source, tmp_path / "other")
    assert files(tmp_path / "other") == before


def test_wrong_parts_are_refused(source: StorePath, tmp_path: Path) -> None:
    for shards in ("9:12", "x", "3:3", "-1:2"):
        done = mmkd_pull(source, tmp_path / "out", "--shards", shards)
        assert isinstance(done.exception, UserError), shards
    done = mmkd_pull(source, tmp_path / "out", "--teachers", "alpha,nobody")
    assert "no teacher 'nobody'; it has alpha, beta" in str(done.exception)
    assert not (tmp_path / "out").exists()
    assert [shard_range(text, 4) for text in ("0:2", "2:", ":2", "3", "1:99")] == [
        range(2), range(2, 4), range(2), range(3, 4), range(1, 4)
    ]  # fmt: skip


@pytest.mark.integration
def test_a_killed_pull_goes_on(bucket: str, tmp_path: Path) -> None:
    """kill -9 at different moments: what is there is sound, and the next pull does no more than what is left."""
    root, out = as_root(bucket), tmp_path / "out"
    fold(make_store(root, 4000, CARDS)[0])  # eight shards
    script = "from mmkd.cli.main import main; main()"
    command = [sys.executable, "-P", "-c", script, "store", "pull", bucket, str(out), "--workers", "2"]
    interrupted = 0
    for wait_for in (2, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("ledger/*.json"))) < wait_for:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            interrupted += 1
        process.wait()
        store = FeatureStore.open(out)
        assert store.verify(deep=True).sound
        assert len(store.ledger) >= wait_for
    assert interrupted
    done = len(FeatureStore.open(out).ledger)
    assert bring(root, out) == 16 - done
    pulled = {name: data for name, data in files(out).items() if not name.endswith(".mmkd-tmp")}
    assert pulled == files(root)


def test_as_many_files_at_the_same_time_as_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s", 300, CARDS)
    pools: list[int] = []

    def pool(workers: int, **names: str) -> ThreadPoolExecutor:
        pools.append(workers)
        return ThreadPoolExecutor(workers, **names)

    monkeypatch.setattr("mmkd.store.pull.ThreadPoolExecutor", pool)
    for out, words in (("a", []), ("b", ["--workers", "3"])):
        assert mmkd_pull(tmp_path / "s", tmp_path / out, *words).exit_code == 0
    assert pools == [8, 3]


def test_a_folder_is_listed_once_however_many_shards_are_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "store", 2000, [make_card("alpha", 8)])
    listed: Counter[str] = Counter()
    real = stored_array.list_folder

    def list_folder(folder: StorePath, *more: str) -> list[StorePath]:
        listed[str(folder)] += 1
        return real(folder, *more)

    monkeypatch.setattr(stored_array, "list_folder", list_folder)
    monkeypatch.setattr("mmkd.store.pull.fold", lambda store: None)
    bring(tmp_path / "store", tmp_path / "out")
    assert max(listed.values()) <= 4  # one for each of the threads that come to it first, of eight shards
    assert len(listed) == 2 * 2 * 3
