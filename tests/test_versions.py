"""Two stores compared, and names for what a store holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_store import make_card, make_index, make_selection, make_store

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.cli.main import cli
from mmkd.store import FeatureStore
from mmkd.store.fold import fold
from mmkd.store.inspect.versions import differences, make_tag, read_tag, store_content, tag_names
from mmkd.store.ledger import remove_entry
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.samples import read_part
from mmkd.store.verify import verify
from mmkd.store.writer import ShardFeatures, add_teacher, append_rows, write_shard

CARDS = [make_card("alpha", 8), make_card("beta", 4)]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A store and its copy."""
    store, _ = make_store(tmp_path / "a", 600, CARDS)
    make_selection(store, "half", np.ones((600, 2), bool), CARDS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def made_again(root: Path, shard: int, value: float) -> None:
    """Other features of one shard."""
    store = Store.open(root)
    remove_entry(root, shard, "alpha")
    rows = len(store.record.shard_rows(shard))
    features = [np.full((rows, 8), value, np.float16)] * 2
    write_shard(store, CARDS[0], shard, ShardFeatures(*features, np.full(rows, 3, np.uint8)), read_part(root, shard)[1])


def lines(one: Path, other: Path) -> list[str]:
    return list(differences(*(store_content(FeatureStore.open(root)) for root in (one, other))))


def test_what_differs_is_named_by_part_and_shard(pair: tuple[Path, Path]) -> None:
    one, other = pair
    assert lines(one, other) == []
    fold(Store.open(other))
    assert lines(one, other) == []
    made_again(other, 1, 2.0)
    made_again(other, 2, 2.0)
    remove_entry(other, 0, "beta")
    shutil.rmtree(other / "selections/half")
    add_teacher(Store.open(other), make_card("gamma", 4))
    assert lines(one, other) == [
        "selection half: only in the first",
        "teacher alpha: shards 1-2 differ",
        "teacher beta: shards 0 only in the first",
        "teacher gamma: only in the second",
    ]
    done = CliRunner().invoke(cli, ["store", "diff", str(one), str(other), "--json"])
    assert (done.exit_code, json.loads(done.output)["equal"]) == (1, False)
    assert CliRunner().invoke(cli, ["store", "diff", str(one), str(one)]).exit_code == 0


def test_other_rows_and_another_teacher_of_the_same_name(tmp_path: Path) -> None:
    make_store(tmp_path / "a", 300, [make_card("alpha", 8)])
    make_store(tmp_path / "b", 280, [make_card("alpha", 8, weights="ff")])
    found = lines(tmp_path / "a", tmp_path / "b")
    assert [line.partition(":")[0] for line in found] == ["rows", "rows", "teacher alpha", "teacher alpha"]
    assert found[1] == "rows: shards 1 differ"
    assert "digest" in found[2]


def test_a_tag_stays_what_it_is(pair: tuple[Path, Path]) -> None:
    root, copy = pair
    tag = make_tag(FeatureStore.open(root), "v1")
    fold(Store.open(root))
    assert make_tag(FeatureStore.open(root), "v1") == tag
    assert make_tag(FeatureStore.open(copy), "other").digest == tag.digest
    assert tag_names(root) == ["v1"]
    listed = CliRunner().invoke(cli, ["store", "tag", str(root)])
    assert (listed.exit_code, listed.output.split()[-1]) == (0, "unchanged")
    made_again(root, 1, 3.0)
    with pytest.raises(UserError, match=r"has a tag 'v1' .* since then teacher alpha changed; a tag never changes"):
        make_tag(FeatureStore.open(root), "v1")
    make_tag(FeatureStore.open(root), "v2")
    listed = CliRunner().invoke(cli, ["store", "tag", str(root)])
    assert listed.exit_code == 1
    assert [line.split("  ")[-1] for line in listed.output.splitlines()] == ["teacher alpha changed", "unchanged"]
    assert verify(root, deep=True).sound


def test_appended_rows_change_the_rows_and_no_teacher(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "s", 300, [make_card("alpha", 8)])
    tag = make_tag(FeatureStore.open(tmp_path / "s"), "v1")
    index = make_index(7).set_column(0, make_index(7).schema.field(0), [list(range(512, 519))])
    append_rows(store, CorpusRecord(kind="test", location="x", root="/", rows=7, labels=("site",), digest="e"), index)
    assert tag.changes(store_content(FeatureStore.open(tmp_path / "s"))) == ["rows changed"]


@pytest.mark.parametrize("damage", [b'"v1"', b'"digest"', b"rows"])
def test_a_tag_whose_bytes_changed(pair: tuple[Path, Path], damage: bytes) -> None:
    make_tag(FeatureStore.open(pair[0]), "v1")
    path = pair[0] / "tags/v1.json"
    data = path.read_bytes()
    place = data.index(damage) + 1
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(CorruptStoreError, match=r"tags/v1\.json"):
        read_tag(pair[0], "v1")
    assert isinstance(CliRunner().invoke(cli, ["store", "tag", str(pair[0])]).exception, CorruptStoreError)


@pytest.mark.parametrize("name", ["../up", "UPPER", ""])
def test_a_name_that_cannot_be_a_file(pair: tuple[Path, Path], name: str) -> None:
    with pytest.raises(UserError, match="tag name"):
        make_tag(FeatureStore.open(pair[0]), name)
