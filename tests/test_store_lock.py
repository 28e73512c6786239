"""Of two writers of one store the second is told who is at work; readers never wait; a kill leaves no lock behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_corpus import write_table_corpus
from tiny_store import make_card, make_store
from tiny_teachers import write_tiny_teacher

from mmkd.base import lock
from mmkd.base.errors import BusyStoreError, StoreError
from mmkd.base.lock import LOCK_FILE, only_writer
from mmkd.base.places.remote import RemotePath, as_root
from mmkd.cli.main import cli
from mmkd.extract.corpora import open_corpus
from mmkd.extract.index import create_indexed_store
from mmkd.store import FeatureStore

HOLD = """
import sys, time
from mmkd.base import lock
from mmkd.base.places.remote import as_root
lock.BEAT_SECONDS = 0.2
with lock.only_writer(as_root(sys.argv[1]), "mmkd store append"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(root: object) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the store."""
    holder = subprocess.Popen([sys.executable, "-P", "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def run(*arguments: object) -> tuple[int, str]:
    """A command's exit status and what it says; an error of ours is one line there."""
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    return done.exit_code, str(done.exception) if done.exception else done.output


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_table_corpus(tmp_path / "corpus", 5)


def test_every_command_that_writes_is_refused_with_one_line_and_goes_on_after_a_kill(
    tmp_path: Path, corpus: Path
) -> None:
    root, source, pulled = tmp_path / "store", tmp_path / "source", tmp_path / "pulled"
    create_indexed_store(open_corpus(str(corpus)), root)
    make_store(source, 20, [make_card("alpha", 4)])
    teacher = write_tiny_teacher(tmp_path / "teacher", seed=1, embed_dim=32)
    (root / "teachers").mkdir()  # verify asks for its document, so there is something to repair
    other = write_table_corpus(tmp_path / "other", 3)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    commands = [
        ("extract", corpus, root, "--teachers", f"one=local-dir:{teacher}", "--workers", 1),
        ("store", "append", root, other),
        ("store", "subset", source, root),
        ("store", "relocate", root, tmp_path),
        ("store", "verify", root, "--repair"),
    ]
    with held(root) as holder:
        for command in commands[:-1]:
            status, line = run(*command)
            assert status == 1
            assert "\n" not in line
            assert f"{root} is being written by `mmkd store append` (process {holder.pid} on " in line
        assert {
            path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != LOCK_FILE
        } == before
        assert len(FeatureStore.open(root)) == 5  # reading asks nobody
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (root / LOCK_FILE).is_file()  # what a kill leaves; it holds nobody up
    assert run("store", "append", root, other)[0] == 0
    assert not (root / LOCK_FILE).exists()
    pulled.mkdir()
    with held(pulled):
        assert "is being written by" in run("store", "pull", source, pulled)[1]
    assert run("store", "pull", source, pulled)[0] == 0


def test_repair_waits_for_nobody_and_drops_nothing_meanwhile(small_store: Path) -> None:
    (small_store / "teachers/alpha/image/loose/00001").write_bytes(b"")
    with held(small_store):
        status, line = run("store", "verify", small_store, "--repair")
        assert status == 1
        assert "is being written by" in line
    assert (small_store / "ledger/00001.alpha.json").is_file()
    assert run("store", "verify", small_store, "--repair")[0] == 0
    assert not (small_store / "ledger/00001.alpha.json").exists()


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "a/b", "x"):
        raise ZeroDivisionError
    assert list((tmp_path / "a").iterdir()) == []


def test_folders_and_files_may_vanish_while_the_lock_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another writer that came to nothing leaves them, at each moment at which it may."""
    mkdir, flock, path = os.mkdir, fcntl.flock, tmp_path / "s" / LOCK_FILE
    made: list[object] = []
    locked: list[int] = []

    def there_when_made_gone_when_looked_at(folder: str, mode: int = 0o777) -> None:
        made.append(folder)
        if len(made) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", folder)
        mkdir(folder, mode)

    def gone_when_locked(fd: int, how: int) -> None:
        flock(fd, how)
        locked.append(fd)
        if len(locked) == 1:
            path.unlink()

    monkeypatch.setattr(os, "mkdir", there_when_made_gone_when_looked_at)
    monkeypatch.setattr(fcntl, "flock", gone_when_locked)
    with only_writer(tmp_path / "s", "x"):
        assert json.loads(path.read_text())["what"] == "x"
    assert made == [tmp_path / "s"] * 3
    assert len(locked) == 2
    assert not (tmp_path / "s").exists()


def test_a_file_where_the_store_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a thesis")
    with pytest.raises(StoreError, match=r"cannot write .*Not a directory"), only_writer(tmp_path / "s", "x"):
        pass
    assert (tmp_path / "s").read_text() == "a thesis"


LOOP = """
import os, sys, time
from pathlib import Path
from mmkd.base.errors import BusyStoreError
from mmkd.base.lock import only_writer
root, inside, entered = Path(sys.argv[1]), Path(sys.argv[2]), 0
end = time.monotonic() + 2
while time.monotonic() < end or not entered:
    try:
        with only_writer(root, "x"):
            entered += 1
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails when another one is inside
            inside.unlink()
    except BusyStoreError:
        pass
print(entered)
"""


def test_never_two_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", LOOP, str(tmp_path / "s"), str(tmp_path / "inside")]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for loop in loops:
        out, err = loop.communicate()
        assert loop.returncode == 0, err
        assert int(out) > 0


@pytest.fixture(params=["s3", "memory"])
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    url = request.getfixturevalue("bucket") if request.param == "s3" else f"memory://m/{request.node.name}"
    root = as_root(url)
    assert isinstance(root, RemotePath)
    return root


def test_behind_a_url_a_living_writer_is_respected(remote: RemotePath) -> None:
    with only_writer(remote, "mmkd extract"):
        time.sleep(0.5)  # it beats
        with (
            pytest.raises(BusyStoreError, match=rf"`mmkd extract` \(process {os.getpid()} on "),
            only_writer(remote, "x"),
        ):
            pass
        assert json.loads((remote / LOCK_FILE).read_bytes())["what"] == "mmkd extract"
    assert not (remote / LOCK_FILE).exists()
    with only_writer(remote, "x"):
        pass


def test_behind_a_url_a_dead_writer_is_succeeded_by_one(remote: RemotePath) -> None:
    (remote / LOCK_FILE).write_bytes(b'{"what": "mmkd extract", "beat": 7}')
    entered, refused, inside = [], [], threading.Semaphore(1)

    def contend() -> None:
        try:
            with only_writer(remote, "x"):
                assert inside.acquire(blocking=False)
                time.sleep(1.5)
                inside.release()
                entered.append(1)
        except BusyStoreError as error:
            refused.append(str(error))

    started = time.monotonic()
    threads = [threading.Thread(target=contend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 2)
    assert time.monotonic() - started > lock.PATIENCE_BEATS * 0.2


def test_a_killed_process_behind_s3_is_succeeded(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    make_store(as_root(bucket), 20, [make_card("alpha", 4)])
    with held(bucket), pytest.raises(BusyStoreError), only_writer(as_root(bucket), "x"):
        pass
    with only_writer(as_root(bucket), "x"):
        assert np.isfinite(FeatureStore.open(bucket).image("alpha")[:]).all()


@pytest.mark.parametrize("place", ["link", "link/store", "link/deep/store", "new/../link/store"])
def test_a_store_below_a_link_to_nothing_is_refused_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(StoreError, match=r"link is a link to .*nowhere, which does not exist"),
        only_writer(as_root(str(tmp_path / place)), "a test"),
    ):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_file_that_can_never_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "no" / "where")
    with pytest.raises(StoreError, match=r"\.mmkd-lock is a link to .*where"), only_writer(tmp_path, "a test"):
        pass
