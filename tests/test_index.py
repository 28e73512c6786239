"""The index: duplicates at any size, changes that are named, flat memory, the same rows however it is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import write_table_corpus, write_tar_corpus

import mmkd.base.duplicates
import mmkd.extract.listing
from mmkd.base.duplicates import find_duplicates, key_hash
from mmkd.base.errors import CorpusError
from mmkd.extract.corpora import open_corpus
from mmkd.extract.index import check_same_corpus, create_indexed_store, restore_parts
from mmkd.store import FeatureStore


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 9))
def test_duplicates_are_those_that_a_dictionary_finds(keys: list[int], per_pass: int) -> None:
    seen: dict[int, int] = {}
    expected = {row: seen[key] for row, key in enumerate(keys) if seen.setdefault(key, row) != row}
    hashes = np.frombuffer(b"".join(key_hash(str(key)) for key in keys), dtype=np.uint64).reshape(-1, 2)
    batches = [hashes[start : start + 7] for start in range(0, len(hashes), 7)]
    before = mmkd.base.duplicates._ROWS_A_PASS
    mmkd.base.duplicates._ROWS_A_PASS = per_pass
    try:
        assert find_duplicates(lambda: batches, len(keys)) == expected
    finally:
        mmkd.base.duplicates._ROWS_A_PASS = before


def index_table(root: Path) -> pa.Table:
    """All rows of a store."""
    return FeatureStore.open(root).sample_table(columns=["row", "key", "caption", "uri", "offset", "status", "reason"])


def test_processes_give_the_rows_that_threads_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(str(write_tar_corpus(tmp_path / "tars", 30, per_tar=4)))
    create_indexed_store(corpus, tmp_path / "a")
    monkeypatch.setattr(mmkd.extract.listing, "_BYTES_WORTH_PROCESSES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    create_indexed_store(open_corpus(str(tmp_path / "tars")), tmp_path / "b")
    assert index_table(tmp_path / "a").equals(index_table(tmp_path / "b"))


def test_a_key_of_another_tar_is_a_duplicate(tmp_path: Path) -> None:
    folder = write_tar_corpus(tmp_path / "tars", 4, per_tar=4)
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes())
    create_indexed_store(open_corpus(str(folder)), tmp_path / "s")
    rows = index_table(tmp_path / "s").to_pylist()
    assert [row["reason"] for row in rows[3:6]] == [None, "key: duplicate of row 0", "key: duplicate of row 1"]
    assert [row["status"] for row in rows[3:6]] == ["pending", "failed", "failed"]


def swap_captions(tar: Path) -> None:
    """Other captions of the same lengths: nothing but the change time and the content tells."""
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"finding 2", b"finding X").replace(b"finding 3", b"finding 2"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: swap_captions(f / "00001.tar"), "00001.tar was written again (same size)"),
        (lambda f: (f / "00001.tar").write_bytes(b"\0" * 10240), "00001.tar has 10,240 bytes, had"),
        (lambda f: (f / "00001.tar").unlink(), "00001.tar is gone"),
        (lambda f: (f / "00009.tar").write_bytes(b"\0" * 1024), "00009.tar is new"),
        (lambda f: [swap_captions(f / "00001.tar"), os.utime(f / "00002.tar", ns=(1, 1))], "(and 1 further changes)"),
    ],
)
def test_what_changed_is_said(tmp_path: Path, change: object, said: str) -> None:
    folder = write_tar_corpus(tmp_path / "tars", 6, per_tar=2)
    store = create_indexed_store(open_corpus(str(folder)), tmp_path / "s")
    check_same_corpus(open_corpus(str(folder)), store)
    change(folder)  # type: ignore[operator]
    with pytest.raises(CorpusError) as caught:
        check_same_corpus(open_corpus(str(folder)), store)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_were_brought_back_are_the_same_corpus(tmp_path: Path) -> None:
    """After a purge, or copied without their times: the rows are compared instead."""
    folder = write_tar_corpus(tmp_path / "tars", 6, per_tar=2)
    store = create_indexed_store(open_corpus(str(folder)), tmp_path / "s")
    for tar in folder.iterdir():
        os.utime(tar, ns=(1, 1))
    assert check_same_corpus(open_corpus(str(folder)), store) == store.record.spans()[0]
    part = tmp_path / "s" / "samples" / "00000.parquet"
    before = part.read_bytes()
    part.unlink()
    assert restore_parts(open_corpus(str(folder)), store) == 1
    assert part.read_bytes() == before


def test_a_table_that_was_only_touched_or_moved_is_the_same_corpus(tmp_path: Path) -> None:
    table = write_table_corpus(tmp_path / "c", 3)
    store = create_indexed_store(open_corpus(str(table)), tmp_path / "s")
    os.utime(table, ns=(1, 1))
    (tmp_path / "c").rename(tmp_path / "moved")
    check_same_corpus(open_corpus(str(tmp_path / "moved" / "pairs.csv")), store)


def test_other_options_are_another_corpus(tmp_path: Path) -> None:
    folder = write_tar_corpus(tmp_path / "tars", 2, per_tar=2)
    store = create_indexed_store(open_corpus(str(folder)), tmp_path / "s")
    (tmp_path / "c.yaml").write_text("kind: webdataset\npath: tars\ncaptions: each\n")
    with pytest.raises(CorpusError, match="the way it is read changed"):
        check_same_corpus(open_corpus(str(tmp_path / "c.yaml")), store)


_PEAK = """
import resource, sys, threading, time
from pathlib import Path
from mmkd.extract.corpora import open_corpus
from mmkd.extract.index import create_indexed_store
peak, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        lines = Path("/proc/self/status").read_text().splitlines()
        peak[0] = max(peak[0], int(next(l for l in lines if l.startswith("RssAnon")).split()[1]))
        time.sleep(0.002)
before = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")).split()[1])
threading.Thread(target=watch, daemon=True).start()
create_indexed_store(open_corpus(sys.argv[1]), Path(sys.argv[2]))
stop.set()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for rows in (60_000, 600_000):
        table = tmp_path / f"{rows}.csv"
        with table.open("w") as file:
            file.write("key,caption,site\n")
            file.writelines(f"k{i},a finding of the number {i} that is described here,s{i % 7}\n" for i in range(rows))
        command = [sys.executable, "-P", "-c", _PEAK, str(table), str(tmp_path / f"s{rows}")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"anonymous memory, kB: {peaks}")
    # Ten times the rows: a dictionary of keys alone would add 100 MB; buffers of a busy machine come to 30.
    assert peaks[1] < peaks[0] + 50_000
