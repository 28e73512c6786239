"""Packs and the folded ledger: bytes that depend on what is finished alone, kills at every step, and hostile files."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from format_reader import read_store
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import tree_digest
from random_store import random_store
from tiny_store import make_card, make_index, make_store

from mmkd.base.errors import CorruptStoreError
from mmkd.base.lock import only_writer
from mmkd.cli.main import cli
from mmkd.store import FeatureStore, ledger
from mmkd.store.fold import fold
from mmkd.store.ledger import entries_of_shard, read_ledger, remove_entry, unfold_entries, write_entry
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.samples import read_part
from mmkd.store.stored_array import StoredArray, decode_index, encode_index, index_bytes
from mmkd.store.verify import repair, verify
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, write_shard

SHARDS, PER_PACK, DIM = 11, 4, 8


def many_shards(root: Path, shards: range = range(SHARDS), seed: int = 0) -> Store:
    """A store of 11 shards in packs of 4, of which `shards` are extracted by two teachers, one of them int8."""
    rows = 256 * SHARDS - 56
    corpus = CorpusRecord(kind="test", location="here", root="/nowhere", rows=rows, labels=("site",), digest="d")
    if not root.exists():
        create_store(root, corpus, make_index(rows), 256, PER_PACK)
    store = Store.open(root)
    cards = [make_card("plain", DIM, towers=("image",)), make_card("small", DIM).with_encoding("int8")]
    for card in cards:
        add_teacher(store, card)
    for shard in shards:
        rng, own = np.random.default_rng((seed, shard)), store.record.shard_rows(shard)
        for card in cards:
            values = {tower: rng.normal(size=(len(own), DIM)).astype(np.float32) for tower in card.towers}
            valid = np.full(len(own), card.all_sound, np.uint8)
            features = ShardFeatures(values.get("image"), values.get("text"), valid)
            write_shard(store, card, shard, features, read_part(root, shard)[1])
    return store


def files(root: Path) -> dict[str, str]:
    """Digests of all files of features and entries."""
    return {name: digest for name, digest in tree_digest(root).items() if not name.startswith("samples")}


def values_of(store: FeatureStore) -> dict[str, np.ndarray]:
    """Every array, in memory."""
    found = {slug: store.valid(slug) for slug in store.teachers}
    towers = [(slug, tower) for slug, card in store.teachers.items() for tower in card.towers]
    return found | {f"{slug}/{tower}": np.array(store.features(slug, tower)[:]) for slug, tower in towers}


def same_values(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k], equal_nan=k.count("/") > 0) for k in one)


def test_folding_changes_files_and_no_value(tmp_path: Path) -> None:
    store = many_shards(tmp_path / "s")
    before = values_of(FeatureStore.open(tmp_path / "s"))
    entries = read_ledger(tmp_path / "s")
    report = fold(store)
    assert (report.packs, report.entries, report.damaged) == (3 * (2 + 5), 2 * SHARDS, [])
    opened = FeatureStore.open(tmp_path / "s")
    assert same_values(values_of(opened), before)
    assert opened.ledger == entries
    assert opened.verify(deep=True).sound
    assert opened.verify().orphans == ()
    names = sorted(name for name in files(tmp_path / "s") if not name.endswith("zarr.json"))
    arrays = [
        "plain/image",
        "plain/valid",
        *(f"small/{name}" for name in ("image", "image_scale", "text", "text_scale", "valid")),
    ]
    tails = {"image": "/0", "text": "/0"}
    packs = [
        f"teachers/{array}/c/{number}{tails.get(array.split('/')[1], '')}" for array in arrays for number in range(3)
    ]
    assert names == sorted(["ledger/folded/00000.jsonl", *packs])
    assert fold(store).packs == 0
    read = read_store(tmp_path / "s")
    for name, values in before.items():
        assert np.array_equal(read[name], values, equal_nan="/" in name)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(SHARDS)), st.lists(st.integers(0, SHARDS), max_size=3))
def test_bytes_do_not_depend_on_the_order_or_on_when_it_was_folded(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], stops: list[int]
) -> None:
    root = tmp_path_factory.mktemp("order")
    expected = many_shards(root / "a")
    fold(expected)
    marks = [0, *sorted(stops), SHARDS]
    for start, end in itertools.pairwise(marks):
        store = many_shards(root / "b", order[start:end])  # type: ignore[arg-type]
        fold(store)
    assert files(root / "b") == files(root / "a")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_any_store_reads_the_same_folded(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    root = tmp_path_factory.mktemp("any")
    store = random_store(root / "s", seed, corpora=1 + seed % 3, teachers=3)
    before, table = values_of(store), store.sample_table()
    fold(store)
    after = FeatureStore.open(root / "s")
    assert same_values(values_of(after), before)
    assert after.sample_table().equals(table)
    assert after.verify(deep=True).sound
    read = read_store(root / "s")
    assert all(np.array_equal(read[name], values, equal_nan="/" in name) for name, values in before.items())
    for slug, card in after.teachers.items():
        for tower in card.towers if card.encoding != "int8" else ():
            plain = zarr.open_array(root / f"s/teachers/{slug}/{tower}")[:]
            assert np.array_equal(plain, before[f"{slug}/{tower}"], equal_nan=True)


def test_a_pack_is_one_map(tmp_path: Path) -> None:
    """Consecutive chunks lie side by side in the file, so that maps are counted by packs."""
    store = make_store(tmp_path / "s", 1800, [make_card("alpha", 8)])[0]
    fold(store)
    array = FeatureStore.open(tmp_path / "s").image("alpha")
    assert isinstance(array, np.ndarray)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len([line for line in lines if "alpha/image/c/0/0" in line]) == 1
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_a_reader_that_was_open_before_keeps_its_data(tmp_path: Path) -> None:
    store = many_shards(tmp_path / "s", range(6))
    opened = FeatureStore.open(tmp_path / "s")
    before = np.array(opened.image("plain"))
    lazily = FeatureStore.open(tmp_path / "s")
    assert len(lazily.ledger) == 12
    fold(store)
    assert np.array_equal(opened.image("plain"), before, equal_nan=True)
    assert np.array_equal(lazily.image("plain"), before, equal_nan=True)  # looked up only now
    assert np.array_equal(opened.valid("plain"), lazily.valid("plain"))
    many_shards(tmp_path / "s", range(6, 8))
    fold(store)  # the second pack has other places now
    assert np.array_equal(lazily.text("small")[:1536], FeatureStore.open(tmp_path / "s").text("small")[:1536])


def test_a_shard_that_is_made_again_goes_before_the_pack(tmp_path: Path) -> None:
    store = many_shards(tmp_path / "s")
    fold(store)
    before = np.array(FeatureStore.open(tmp_path / "s").image("plain"))
    remove_entry(tmp_path / "s", 5, "plain")
    assert np.isnan(FeatureStore.open(tmp_path / "s").image("plain")[5 * 256 : 6 * 256]).all()
    card, other = store_card(tmp_path / "s", "plain"), np.ones((256, DIM), np.float16)
    write_shard(store, card, 5, ShardFeatures(other, None, np.ones(256, np.uint8)), read_part(tmp_path / "s", 5)[1])
    for _ in range(2):
        opened = FeatureStore.open(tmp_path / "s")
        assert opened.verify(deep=True).sound
        assert (opened.image("plain")[5 * 256 : 6 * 256] == 1).all()
        assert np.array_equal(opened.image("plain")[: 5 * 256], before[: 5 * 256])
        fold(store)
    assert not list((tmp_path / "s").rglob("loose"))


def store_card(root: Path, slug: str) -> Any:
    return FeatureStore.open(root).card(slug)


def fold_to_the_death(root: Path, stop: int) -> None:
    """Fold in this process, which ends at the replacing or unlinking after so many others."""
    done = 0

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if ".mmkd-tmp" in str(args[0]) or args[0].is_relative_to(root):
                done += 1
                if done > stop:
                    os._exit(9)
            return act(*args, **kwargs)

        return call

    Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)  # type: ignore[method-assign]
    fold(Store.open(root))


def forked(act: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A child that has all imported already."""
    child = multiprocessing.get_context("fork").Process(target=act, args=arguments)
    child.start()
    return child


@pytest.mark.integration
def test_a_kill_at_every_step_leaves_a_sound_store_that_folds_to_the_same_bytes(tmp_path: Path) -> None:
    whole = many_shards(tmp_path / "whole")
    fold(whole)
    before = values_of(FeatureStore.open(tmp_path / "whole"))
    many_shards(tmp_path / "loose")
    for stop in (0, 1, 2, 5, 9, 30, 77, 78, 79, 80, 81, 90, 100):
        root = tmp_path / f"killed-{stop}"
        shutil.copytree(tmp_path / "loose", root)
        child = forked(fold_to_the_death, root, stop)
        child.join()
        assert child.exitcode == 9
        opened = FeatureStore.open(root)
        assert same_values(values_of(opened), before), stop
        assert opened.verify().sound
        for path in root.rglob(".*.mmkd-tmp"):
            path.unlink()
        fold(Store.open(root))
        assert files(root) == files(tmp_path / "whole"), stop


@pytest.mark.integration
def test_real_kills_while_folding(tmp_path: Path) -> None:
    """kill -9 of a process that folds, over and over, then one that comes through."""
    whole = many_shards(tmp_path / "whole")
    began = time.monotonic()
    fold(whole)
    took = time.monotonic() - began
    before, store = values_of(FeatureStore.open(tmp_path / "whole")), many_shards(tmp_path / "s")
    for share in np.linspace(0.05, 1.2, 12):
        child = forked(fold, store)
        child.join(timeout=float(share) * took)
        child.kill()
        child.join()
        assert same_values(values_of(FeatureStore.open(tmp_path / "s")), before)
    fold(store)
    for path in (tmp_path / "s").rglob(".*.mmkd-tmp"):
        path.unlink()
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_two_writers_of_one_pack(tmp_path: Path) -> None:
    """The lock refuses the second; without a lock (some file systems have none) both write the same bytes."""
    whole = many_shards(tmp_path / "whole")
    fold(whole)
    store = many_shards(tmp_path / "s")
    command = [
        sys.executable,
        "-P",
        "-c",
        "from mmkd.cli.main import main; main()",
        "store",
        "fold",
        str(tmp_path / "s"),
    ]
    with only_writer(tmp_path / "s", "mmkd extract"):
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "is being written by `mmkd extract`" in second.stderr
    errors: list[BaseException] = []

    def act() -> None:
        try:
            fold(store)
        except CorruptStoreError as error:  # of a chunk that the other packed and deleted between two looks
            errors.append(error)

    threads = [threading.Thread(target=act) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fold(store)
    assert errors == []
    assert files(tmp_path / "s") == files(tmp_path / "whole")


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    """The folded store."""
    fold(many_shards(tmp_path / "s"))
    return tmp_path / "s"


def refused(root: Path, what: str) -> None:
    """Reading and verifying name the file; repair drops what is unsound, and extraction makes it again."""
    with pytest.raises(CorruptStoreError, match=what):
        values_of(FeatureStore.open(root))
    report = verify(root)
    assert any(what in problem for problem in report.problems)
    repair(root, report)
    assert verify(root, deep=True).sound
    left = read_ledger(root)
    many_shards_missing(root, left)
    fold(Store.open(root))
    assert verify(root, deep=True).sound


def many_shards_missing(root: Path, left: dict[tuple[int, str], Any]) -> None:
    """Extract what the ledger lacks."""
    whole = many_shards(root.parent / "whole")
    fold(whole)
    lacking = sorted({shard for shard in range(SHARDS) for slug in ("plain", "small") if (shard, slug) not in left})
    unfold_entries(root, set(lacking))
    many_shards(root, lacking)  # type: ignore[arg-type]
    fold(Store.open(root))
    assert files(root) == files(root.parent / "whole")


def index_of(pack: Path) -> np.ndarray:
    """The offsets and lengths of a pack's chunks, (4, 2)."""
    return np.frombuffer(pack.read_bytes()[-index_bytes(PER_PACK) : -4], "<u8").reshape(PER_PACK, 2).copy()


def put_index(pack: Path, table: np.ndarray, crc: int | None = None) -> None:
    """Put another index behind the chunks."""
    body = table.astype("<u8").tobytes()
    data = pack.read_bytes()[: -index_bytes(PER_PACK)] + body
    pack.write_bytes(data + (google_crc32c.value(body) if crc is None else crc).to_bytes(4, "little"))


def test_a_pack_cut_short(folded: Path) -> None:
    pack = folded / "teachers/plain/image/c/1/0"
    pack.write_bytes(pack.read_bytes()[:-100])
    refused(folded, "teachers/plain/image/c/1/0 is no whole pack")


def test_an_empty_pack_and_a_pack_that_is_gone(folded: Path) -> None:
    (folded / "teachers/plain/image/c/1/0").write_bytes(b"")
    (folded / "teachers/small/text/c/0/0").unlink()
    refused(folded, "teachers/plain/image/c/1/0 is no whole pack")


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ((0, 0), 1 << 40, "inside the pack"),
        ((1, 0), 3 * 256 * DIM * 2 + 4096, "inside the pack"),
        ((2, 1), 77, "inside the pack"),
        ((2, 0), 256 * DIM * 2 + 2, "overlap"),
        ((3, 0), 0, "overlap"),
        ((3, 0), (1 << 64) - 5, "inside the pack"),
    ],
)
def test_a_hostile_index(folded: Path, place: tuple[int, int], value: int, what: str) -> None:
    pack = folded / "teachers/plain/image/c/0/0"
    table = index_of(pack)
    table[place] = value
    put_index(pack, table)
    refused(folded, what)


def test_an_index_with_a_wrong_crc_or_a_chunk_that_is_missing_in_it(folded: Path) -> None:
    pack = folded / "teachers/plain/image/c/0/0"
    table = index_of(pack)
    put_index(pack, table, crc=1)
    refused(folded, "teachers/plain/image/c/0/0 is no whole pack")
    table = index_of(pack)
    table[2] = (1 << 64) - 1
    put_index(pack, table)
    refused(folded, "teachers/plain/image/c/0/0")


def test_chunks_that_changed_places_are_found_by_their_checksums(folded: Path) -> None:
    pack = folded / "teachers/plain/image/c/0/0"
    put_index(pack, index_of(pack)[[1, 0, 2, 3]])
    report = verify(folded)
    assert [problem.shard for problem in report.findings] == [0, 1]
    assert all("has CRC32C" in problem.what for problem in report.findings)


def test_every_changed_byte_of_a_pack_and_of_the_folded_ledger_is_found(folded: Path) -> None:
    rng = np.random.default_rng(0)
    for file in ("teachers/plain/image/c/2/0", "teachers/small/text_scale/c/0", "ledger/folded/00000.jsonl"):
        data = (folded / file).read_bytes()
        for place in [*rng.integers(0, len(data), 25).tolist(), *range(len(data) - 20, len(data))]:
            changed = bytearray(data)
            changed[place] ^= 1 << int(rng.integers(8))
            (folded / file).write_bytes(changed)
            assert not verify(folded).sound, (file, place)
        (folded / file).write_bytes(data)
    assert verify(folded).sound


def test_packs_of_another_writer_may_lie_anywhere(folded: Path) -> None:
    """Gaps, another order, no page boundary: the same values, if not by a map."""
    expected = values_of(FeatureStore.open(folded))
    pack = folded / "teachers/plain/image/c/0/0"
    data, size = pack.read_bytes(), 256 * DIM * 2
    starts, body = [], b""
    for place in range(PER_PACK):
        body += b"gap"
        starts.append(len(body))
        body += data[place * size : (place + 1) * size]
    pack.write_bytes(body + bytes(index_bytes(PER_PACK)))
    put_index(pack, np.array([[start, size] for start in starts]))
    opened = FeatureStore.open(folded)
    assert same_values(values_of(opened), expected)
    assert opened.verify(deep=True).sound
    assert np.array_equal(zarr.open_array(folded / "teachers/plain/image")[:], expected["plain/image"], equal_nan=True)


def test_a_loose_entry_that_disagrees_with_the_folded_one(folded: Path) -> None:
    entry = read_ledger(folded)[3, "plain"]
    write_entry(folded, entry)
    assert verify(folded).sound  # the same: a fold that was stopped
    write_entry(folded, entry.model_copy(update={"image_rows": 7}))
    for read in (lambda: read_ledger(folded), lambda: entries_of_shard(folded, 3), lambda: fold(Store.open(folded))):
        with pytest.raises(CorruptStoreError, match=r"disagrees with ledger/folded/00000\.jsonl"):
            read()
    report = verify(folded)
    assert "vouch for different features" in report.problems[0]
    done = repair(folded, report)
    assert {"dropped ledger/00003.plain.json", "dropped ledger/00003.plain.json from ledger/folded/00000.jsonl"} <= set(
        done
    )
    assert (3, "plain") not in read_ledger(folded)
    assert verify(folded).sound


def test_a_damaged_folded_ledger_keeps_what_agrees_with_the_files(folded: Path) -> None:
    path = folded / "ledger/folded/00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b'"image_rows":256', b'"image_rows":255')
    lines[7] = lines[7][:40] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(CorruptStoreError, match="was cut or changed after it was written"):
        read_ledger(folded)
    result = CliRunner().invoke(cli, ["store", "verify", str(folded), "-n", "1", "--repair"])
    assert "wrote ledger/folded/00000.jsonl again" in result.output
    assert len(read_ledger(folded)) == 2 * SHARDS - 2
    assert verify(folded, deep=True).sound


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    many_shards(tmp_path / "s")
    chunk = tmp_path / "s/teachers/plain/image/loose/00009"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    result = CliRunner().invoke(cli, ["store", "fold", str(tmp_path / "s")])
    assert "20 packs written, 22 ledger entries folded" in result.output
    assert "not packed: teachers/plain/image/loose/00009 has" in result.output
    assert result.exit_code == 1


def test_index_is_read_back() -> None:
    present = [True, False, True, True]
    data = encode_index(present, 64)
    assert decode_index(data, 3 * 64 + len(data), 4, 64, "x") == (0, None, 64, 128)
    for wrong in (data[:-1], data[1:], b"", bytes(len(data))):
        with pytest.raises(CorruptStoreError):
            decode_index(wrong, 3 * 64 + len(data), 4, 64, "x")


def test_xarray_and_tensorstore_open_it(folded: Path) -> None:
    expected = values_of(FeatureStore.open(folded))
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folded / "teachers/plain/image")}}
    found = tensorstore.open(spec, read=True).result()
    assert np.array_equal(found[:].read().result(), expected["plain/image"], equal_nan=True)
    xarray = pytest.importorskip("xarray")
    data = xarray.open_zarr(folded / "teachers/plain", consolidated=False, chunks=None)
    assert data["image"].dims == ("row", "feature")
    assert data["valid"].dims == ("row",)
    assert np.array_equal(data["image"].values, expected["plain/image"], equal_nan=True)


class Forgetful(StoredArray):
    """Another thread forgets what was looked up as soon as it is kept."""

    class Indexes(dict[int, Any]):
        def __setitem__(self, number: int, index: Any) -> None:
            pass

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, {"_listed": None, "_indexes": self.Indexes()}.get(name, value))


def test_an_array_is_read_while_another_thread_looks_its_files_up_again(folded: Path) -> None:
    store = FeatureStore.open(folded)
    array = Forgetful(store, "small", store.card("small").tower_arrays("image")[0])
    for (shard, slug), entry in store.ledger.items():
        if slug == "small":
            assert array.read(shard, entry.crc32c(array.spec)).shape == (256, DIM)


def test_an_entry_is_removed_without_reading_those_of_other_shards(
    folded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Any] = []
    real = ledger.parse_document
    monkeypatch.setattr(ledger, "parse_document", lambda *given: parsed.append(given) or real(*given))
    remove_entry(folded, 1, "nobody")
    assert len(parsed) == 2
    assert len(read_ledger(folded)) == 2 * len({shard for shard, _ in read_ledger(folded)})
