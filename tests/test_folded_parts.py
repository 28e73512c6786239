"""Folded sample parts: one file of 64 parts that keep their bytes, read by any Parquet reader."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_reader import read_store
from tiny_store import make_card, make_index

from mmkd.base.errors import CorruptStoreError
from mmkd.store import FeatureStore, folded_parts
from mmkd.store.fold import fold
from mmkd.store.folded_parts import folded_end, read_folded_parts, split_parts
from mmkd.store.ledger import remove_entry
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.samples import encode_part, read_part, sample_schema, with_columns, write_part
from mmkd.store.verify import repair, verify
from mmkd.store.writer import ShardFeatures, add_teacher, append_rows, create_store, first_new_row, write_shard

SHARDS, CARD = 66, make_card("alpha", 2, towers=("image",))
FILE = "samples/folded/00000.parquet"


def write(store: Store, shard: int, status: str = "ok") -> str:
    """A finished shard of one teacher; returns the SHA-256 of its part."""
    table, _ = read_part(store.root, shard)
    reason = [None if row % 2 or status == "ok" else "image: truncated" for row in range(len(table))]
    sha256 = write_part(store.root, shard, with_columns(table, {"status": [status] * len(table), "reason": reason}))
    values = np.random.default_rng(shard).normal(size=(len(table), 2)).astype(np.float32)
    write_shard(store, CARD, shard, ShardFeatures(values, None, np.ones(len(table), np.uint8)), sha256)
    return sha256


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 shards, all finished: 64 parts in one file, two on their own."""
    root = tmp_path_factory.mktemp("folded") / "s"
    rows = 256 * SHARDS - 56
    corpus = CorpusRecord(kind="test", location="here", root="/nowhere", rows=rows, labels=("site",), digest="d")
    store = create_store(root, corpus, make_index(rows), 256)
    add_teacher(store, CARD)
    for shard in range(SHARDS):
        write(store, shard, "partial" if shard == 5 else "ok")
    assert fold(store).damaged == []
    return root


@pytest.fixture
def store(folded: Path, tmp_path: Path) -> Store:
    shutil.copytree(folded, tmp_path / "s")
    return Store.open(tmp_path / "s")


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root / "samples").as_posix() for path in (root / "samples").rglob("*.parquet"))


def test_parts_keep_their_bytes_and_every_reader_sees_one_table(folded: Path) -> None:
    assert names(folded) == ["00064.parquet", "00065.parquet", "folded/00000.parquet"]
    opened = FeatureStore.open(folded)
    rows = 256 * SHARDS - 56
    for shard in (0, 5, 63, 64):
        table, sha256 = read_part(folded, shard)
        assert table["row"].to_pylist() == list(range(256 * shard, 256 * shard + 256))
        assert opened.ledger[shard, "alpha"].samples_sha256 == sha256
    assert opened.sample_table(["row"])["row"].to_pylist() == list(range(rows))
    assert opened.sample_table(["key"], pa.compute.field("row") == 1300)["key"].to_pylist() == ["k1300"]
    files = f"{folded}/samples/**/*.parquet"
    found = duckdb.sql(f"select count(*), count(distinct key), sum(row) from read_parquet('{files}')").fetchall()
    assert found == [(rows, rows, rows * (rows - 1) // 2)]
    assert pl.scan_parquet(files).filter(pl.col("row") >= 16_000).select(pl.len()).collect().item() == rows - 16_000
    metadata = pq.read_metadata(folded / FILE)
    assert (metadata.num_row_groups, metadata.num_rows) == (64, 64 * 256)
    assert verify(folded, deep=True).sound
    assert verify(folded).orphans == ()
    assert read_store(folded)[""] == opened.sample_table().to_pylist()


def test_what_is_counted_is_in_the_footer(folded: Path, store: Store) -> None:
    expected = {"ok": 256 * SHARDS - 56 - 256, "partial": 256}
    assert read_folded_parts(folded / FILE).counts == {
        "status": {"ok": 63 * 256, "partial": 256},
        "reason": {"image: truncated": 128},
    }
    assert FeatureStore.open(folded).summary().status == expected
    assert FeatureStore.open(folded).summary().reasons == {"image: truncated": 128}
    remove_entry(store.root, 5, "alpha")
    write(store, 5)  # its own part hides the folded one
    assert FeatureStore.open(store.root).summary().status == {"ok": 256 * SHARDS - 56}
    assert FeatureStore.open(store.root).summary().reasons == {}


@pytest.mark.integration
def test_a_shard_that_is_written_again_hides_what_was_folded_and_is_folded_again(folded: Path, store: Store) -> None:
    remove_entry(store.root, 5, "alpha")
    sha256 = write(store, 5)
    assert names(store.root)[0] == "00005.parquet"
    assert read_part(store.root, 5)[1] == sha256
    assert FeatureStore.open(store.root).sample_table(["status"])["status"].to_pylist() == ["ok"] * (256 * SHARDS - 56)
    assert verify(store.root).sound
    assert fold(store).damaged == []
    assert names(store.root) == names(folded)
    assert read_part(store.root, 5)[1] == sha256
    assert verify(store.root, deep=True).sound
    remove_entry(store.root, 5, "alpha")
    write(store, 5, "partial")
    fold(store)
    assert (store.root / FILE).read_bytes() == (folded / FILE).read_bytes()  # whatever happened in between


def test_a_kill_between_the_folded_file_and_the_parts_costs_nothing(folded: Path, store: Store) -> None:
    data = (store.root / FILE).read_bytes()
    for shard, part in enumerate(split_parts(data)):
        (store.root / f"samples/{shard:05d}.parquet").write_bytes(part)
    assert len(names(store.root)) == SHARDS + 1
    assert verify(store.root).sound
    assert len(FeatureStore.open(store.root).sample_table(["row"])) == 256 * SHARDS - 56
    fold(store)
    assert names(store.root) == names(folded)
    assert (store.root / FILE).read_bytes() == data


def test_parts_of_shards_that_are_not_all_finished_stay(store: Store, tmp_path: Path) -> None:
    corpus = CorpusRecord(kind="test", location="here", root="/nowhere", rows=256 * 64, labels=(), digest="d")
    other = create_store(tmp_path / "t", corpus, make_index(256 * 64).drop_columns("site"), 256)
    add_teacher(other, CARD)
    write(other, 3)
    fold(other)
    assert len(names(tmp_path / "t")) == 64


def flip(path: Path, index: int) -> None:
    with path.open("r+b") as file:
        file.seek(index)
        (byte,) = file.read(1)
        file.seek(index)
        file.write(bytes([byte ^ 1]))


@pytest.mark.integration
def test_a_damaged_footer_costs_no_row(folded: Path, store: Store) -> None:
    path = store.root / FILE
    size, parts = path.stat().st_size, sum(place.length for place in read_folded_parts(path).places.values())
    before = FeatureStore.open(folded).ledger
    for index in (parts + 20_000, size - 5, size - 1):
        flip(path, index)
        assert any(problem.startswith(FILE) for problem in verify(store.root).problems), index
        flip(path, index)
    flip(path, size - 6)  # the length of the footer
    done = repair(store.root, verify(store.root))
    assert done == (f"unfolded {FILE}",)
    assert verify(store.root).sound
    assert FeatureStore.open(store.root).ledger == before
    fold(store)
    assert path.read_bytes() == (folded / FILE).read_bytes()


def test_a_damaged_part_costs_its_own_shard(store: Store) -> None:
    flip(store.root / FILE, read_folded_parts(store.root / FILE).places[7].offset + 40)
    report = verify(store.root)
    assert {problem.split(":")[0] for problem in report.problems} >= {"shard 7"}
    done = repair(store.root, report)
    assert f"unfolded {FILE}" in done
    assert (7, "alpha") not in FeatureStore.open(store.root).ledger
    assert len(FeatureStore.open(store.root).ledger) == SHARDS - 1
    assert "00007.parquet" not in names(store.root)
    assert len(names(store.root)) == SHARDS - 1
    with pytest.raises(CorruptStoreError, match=r"samples/00007\.parquet is missing"):
        FeatureStore.open(store.root).sample_table()


@pytest.mark.parametrize("how", ["folder", "pipe"])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, how: str) -> None:
    corpus = CorpusRecord(kind="test", location="here", root="/nowhere", rows=3, labels=("site",), digest="d")
    create_store(tmp_path / "s", corpus, make_index(3))
    (tmp_path / "s/samples/folded").mkdir()
    (os.mkfifo if how == "pipe" else os.mkdir)(tmp_path / "s" / FILE)
    with pytest.raises(
        CorruptStoreError, match=r"folded/00000\.parquet is no file of folded sample parts: it is a folder"
    ):
        FeatureStore.open(tmp_path / "s").sample_table()
    assert any(FILE in problem for problem in verify(tmp_path / "s").problems)


def test_a_cut_file_is_named(store: Store) -> None:
    path = store.root / FILE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptStoreError, match=r"folded/00000\.parquet is no file of folded sample parts"):
        FeatureStore.open(store.root).sample_table()
    assert f"{FILE}: " in "\n".join(verify(store.root).problems)


@pytest.mark.integration
def test_another_label_is_written_into_parts_of_their_own(store: Store) -> None:
    first = first_new_row(store.record)
    index = make_index(10).drop_columns("site").append_column("organ", pa.array(["lung"] * 10))
    rows = index.set_column(0, pa.field("row", pa.int64(), nullable=False), pa.array(range(first, first + 10)))
    rows = rows.set_column(1, pa.field("key", pa.string(), nullable=False), pa.array([f"n{row}" for row in range(10)]))
    corpus = CorpusRecord(kind="test", location="there", root="/nowhere", rows=10, labels=("organ",), digest="e")
    longer = append_rows(store, corpus, rows)
    assert verify(store.root).sound
    fold(longer)
    assert verify(store.root).sound
    assert pq.read_schema(store.root / FILE).names[-2:] == ["site", "organ"]
    assert FeatureStore.open(store.root).sample_table(["organ"])["organ"].to_pylist()[-1] == "lung"


def test_the_mark_of_parquet_in_a_text_costs_no_part() -> None:
    table = make_index(600).cast(sample_schema(("site",)))
    keys = [f"PAR1PAR1 {row}" for row in range(600)]  # least and largest stand in the footers
    parts = {n: encode_part(with_columns(table, {"key": keys}).slice(300 * n, 300))[0] for n in (0, 1)}
    assert parts[0].count(b"PAR1PAR1") > 1
    assert split_parts(b"".join(parts.values()) + folded_end(parts)) == list(parts.values())
    assert split_parts(parts[0] + b"PAR1" + parts[1][:-1] + b"PAR1") == [parts[0]]


@pytest.mark.parametrize(
    "footer",
    [
        b"\0",
        b"\x29" + b"\xf1" + b"\xff" * 5 + b"\x0f\0",
        b"\x1c" * 9000,
        b"\x16" + b"\xff" * 99 + b"\1\0",
        b"\x49\x1c\0\0",
    ],
)
def test_hostile_footers_are_named(footer: bytes) -> None:
    data = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(CorruptStoreError, match="a sample part does not end with a Parquet footer"):
        folded_end({0: data})
    assert split_parts(data) == []


def test_the_footer_is_read_once_for_the_parts_of_a_file(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = folded_parts.read_range, []
    monkeypatch.setattr(folded_parts, "read_range", lambda *what: asked.append(what[0].name) or read(*what))
    folded_parts._read_footer.cache_clear()
    for shard in (3, 4, 3):
        read_part(folded, shard)
    assert asked == ["00000.parquet"]
    os.utime(folded / FILE)
    read_part(folded, 3)
    assert asked == ["00000.parquet"] * 2


def test_parts_of_other_columns_or_several_row_groups_are_no_one_file() -> None:
    table = make_index(600).cast(sample_schema(("site",)))
    one = encode_part(table)[0]
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=256)
    for other in (encode_part(table.drop_columns("site"))[0], sink.getvalue().to_pybytes()):
        with pytest.raises(CorruptStoreError, match="sample part 1 has several row groups, or other columns"):
            folded_end({0: one, 1: other})
    with pytest.raises(CorruptStoreError, match="does not end with a Parquet footer"):
        folded_end({0: one[:-3]})
    whole = one + folded_end({0: one})
    assert pq.read_table(pa.BufferReader(whole)).equals(table)
    assert hashlib.sha256(split_parts(whole)[0]).digest() == hashlib.sha256(one).digest()
