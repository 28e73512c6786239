"""Repair drops what is unsound and nothing else; the next extraction brings the same bytes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from in_process import run, tree_digest
from tiny_corpus import write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.cli.store import store as store_command
from mmkd.extract.corpora import open_corpus
from mmkd.extract.index import restore_parts
from mmkd.extract.teachers import Teacher, describe_teacher, load_teacher, parse_teachers
from mmkd.store import FeatureStore
from mmkd.store.samples import read_part
from mmkd.store.verify import repair, verify


def flip(path: Path, index: int = -9) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[index] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damaged", "dropped"),
    [
        ("teachers/alpha/image/loose/00001", ["ledger/00001.alpha.json"]),
        ("teachers/beta/valid/loose/00002", ["ledger/00002.beta.json"]),
        ("ledger/00000.beta.json", ["ledger/00000.beta.json"]),
        ("samples/00001.parquet", ["ledger/00001.alpha.json", "ledger/00001.beta.json", "samples/00001.parquet"]),
        ("teachers/alpha/zarr.json", [*(f"ledger/0000{i}.alpha.json" for i in range(3)), "teachers/alpha/zarr.json"]),
    ],
)
def test_repair_drops_exactly_what_is_bad(small_store: Path, damaged: str, dropped: list[str]) -> None:
    before = {path for path in small_store.rglob("*") if path.is_file()}
    flip(small_store / damaged, index=40 if damaged.endswith("json") else -9)
    report = verify(small_store)
    assert not report.sound
    assert repair(small_store, report) == tuple(f"dropped {name}" for name in dropped)
    after = {path for path in small_store.rglob("*") if path.is_file()}
    assert before - after == {small_store / name for name in dropped}
    left = verify(small_store)
    # Only the dropped part itself is still missing, until the corpus is listed again.
    assert [finding.file for finding in left.findings] == [name for name in dropped if name.startswith("samples")]


def test_old_temporary_files_go_and_young_ones_stay(small_store: Path) -> None:
    for name, age in (("old", 7200), ("young", 60)):
        path = small_store / f"samples/.{name}.1-ab.mmkd-tmp"
        path.write_bytes(b"half")
        stat = path.stat()
        os.utime(path, (stat.st_atime - age, stat.st_mtime - age))
    assert repair(small_store, verify(small_store)) == ("dropped samples/.old.1-ab.mmkd-tmp",)
    assert verify(small_store).temporary == ("samples/.young.1-ab.mmkd-tmp",)


def test_chunks_without_an_entry_and_strangers_are_listed_and_left(small_store: Path) -> None:
    (small_store / "ledger/00002.alpha.json").unlink()
    (small_store / "samples/notes.txt").write_text("mine")
    (small_store / "samples/copy.parquet").write_bytes((small_store / "samples/00000.parquet").read_bytes())
    report = verify(small_store)
    assert report.sound
    assert report.orphans == (
        "samples/copy.parquet",
        "samples/notes.txt",
        "teachers/alpha/image/loose/00002",
        "teachers/alpha/text/loose/00002",
        "teachers/alpha/valid/loose/00002",
    )
    assert repair(small_store, report) == ()
    assert FeatureStore.open(small_store).sample_table().num_rows == 600  # the copy is not read


def test_a_key_of_two_rows_is_found(small_store: Path) -> None:
    from mmkd.store.samples import with_columns, write_part

    table, _ = read_part(small_store, 1)
    write_part(small_store, 1, with_columns(table, {"key": ["k7", *table["key"].to_pylist()[1:]]}))
    assert any("1 keys name more than one row, the first is 'k7'" in line for line in verify(small_store).problems)


def test_the_command_repairs_and_says_what_it_did(small_store: Path) -> None:
    flip(small_store / "teachers/alpha/text/loose/00000")
    runner = CliRunner()
    first = runner.invoke(store_command, ["verify", str(small_store)])
    assert first.exit_code == 1
    assert "shard 0 of alpha: teachers/alpha/text/loose/00000 has CRC32C" in first.output
    second = runner.invoke(store_command, ["verify", str(small_store), "--repair", "--deep"])
    assert second.exit_code == 0
    assert "dropped ledger/00000.alpha.json" in second.output
    assert "sound: bytes and values of 5 ledger entries checked" in second.output


@pytest.mark.parametrize(
    ("damaged", "said"),
    [("teachers/alpha/text/loose/00001", "shard 1 of alpha"), ("samples/00001.parquet", "00001.parquet")],
)
def test_the_command_says_which_share_of_the_store_it_read(small_store: Path, damaged: str, said: str) -> None:
    flip(small_store / damaged)
    words = ["verify", str(small_store), "-n", "1", "--seed"]
    seen = [CliRunner().invoke(store_command, [*words, str(seed)]) for seed in range(9)]
    by_code = {done.exit_code: done.output for done in seen}
    assert set(by_code) == {0, 1}  # as the shard that is damaged was drawn or not
    assert by_code[0].startswith("sound: bytes of 2 ledger entries checked (1 of 3 shards, drawn at random), 0 temp")
    assert said in by_code[1]


def test_extraction_after_repair_gives_the_same_bytes(tmp_path: Path) -> None:
    corpus = write_table_corpus(tmp_path / "corpus", 300)
    folder = write_tiny_teacher(tmp_path / "one", seed=1)
    torch.set_num_threads(1)
    (spec,) = parse_teachers(f"one=local-dir:{folder}")
    teachers: dict[str, Teacher] = {"one": load_teacher(spec, describe_teacher(spec), torch.device("cpu"))}
    root = tmp_path / "store"
    run(corpus, root, teachers)
    before = tree_digest(root)
    for name in ("samples/00001.parquet", "teachers/one/text/loose/00000", "teachers/one/image/zarr.json"):
        flip(root / name, index=60)
    assert len(repair(root, verify(root))) == 4
    assert not FeatureStore.open(root).available().any()
    assert restore_parts(open_corpus(str(corpus)), FeatureStore.open(root)) == 1
    run(corpus, root, teachers)
    assert tree_digest(root) == before
    assert verify(root, deep=True).sound
