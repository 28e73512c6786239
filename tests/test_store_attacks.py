"""A store under attack: flipped bytes, hostile metadata, files cut, replaced or missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_store import every_file, found, make_card, make_store

from mmkd.base.errors import CorruptStoreError, NotAStoreError, StoreError
from mmkd.store import FeatureStore
from mmkd.store.fold import fold
from mmkd.store.hierarchy import group_document, read_json
from mmkd.store.record import Store, StoreRecord, read_record
from mmkd.store.stored_array import index_bytes
from mmkd.store.verify import repair, verify


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of one teacher one value wide: 8 KB."""
    root = tmp_path_factory.mktemp("attacks") / "store"
    make_store(root, 3, [make_card("a", 1)])
    assert not found(root)
    return root


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_flipped_is_found(smallest: Path, step: int) -> None:
    files = every_file(smallest)
    assert {path.relative_to(smallest).parts[0] for path in files} == {"zarr.json", "samples", "teachers", "ledger"}
    missed = []
    for path in files:
        data = path.read_bytes()
        with path.open("r+b") as file:
            for index in range(0, len(data), step):
                # One bit of each byte, another one each time.
                os.pwrite(file.fileno(), bytes([data[index] ^ (1 << index % 8)]), index)
                if not found(smallest):
                    missed.append((str(path.relative_to(smallest)), index))
                os.pwrite(file.fileno(), data[index : index + 1], index)
    assert missed == []
    assert not found(smallest)


def test_zarr_refuses_a_flipped_index(small_store: Path) -> None:
    fold(Store.open(small_store))
    path = small_store / "teachers/alpha/image/c/0/0"
    data = bytearray(path.read_bytes())
    for index in range(len(data) - index_bytes(32), len(data), 7):
        data[index] ^= 0x40
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"[Cc]hecksum|crc32c"):
            zarr.open_array(small_store / "teachers/alpha/image", mode="r")[256:512]
        data[index] ^= 0x40


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "longer", "a folder"])
def test_files_missing_or_of_another_size_are_found(smallest: Path, damage: str) -> None:
    for path in every_file(smallest):
        data = path.read_bytes()
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "longer": data + b"\0"}[damage])
        name = path.relative_to(smallest).as_posix()
        # A shard without its entry, or a teacher without its card, counts as not done: nothing is claimed.
        told = found(smallest) or (damage == "missing" and name.startswith("ledger/") and not claims(smallest))
        assert told, f"{name} {damage}"
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert not found(smallest)


def claims(root: Path) -> bool:
    """Whether the store says that any feature is there."""
    store = FeatureStore.open(root)
    return bool(store.available().any() or np.isfinite(store.image("a")).any())


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """What an attacker does: change the content and seal it again."""
    content = read_json(path)["attributes"]["mmkd"]
    content.pop("sha256")
    change(content)
    path.write_text(json.dumps(group_document(content)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 1 << 62, "more than 1048576 shards"),
        ("rows", -1, "greater than or equal to 0"),
        ("rows", 1e300, "integer"),
        ("rows_per_shard", 1 << 40, "power of two from 256 to 16384"),
        ("rows_per_shard", 300, "power of two from 256 to 16384"),
        ("rows_per_shard", 0, "greater than 0"),
        ("evil", 1, "not permitted"),
        ("corpus", {"kind": "x", "location": "", "root": "", "rows": 3, "labels": ["key"], "digest": ""}, "labels"),
    ],
)
def test_a_hostile_record_is_refused(small_store: Path, field: str, value: object, message: str) -> None:
    reseal(small_store / "zarr.json", lambda content: content.update({field: value}))
    with pytest.raises(CorruptStoreError, match=message):
        FeatureStore.open(small_store)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slug", "../../etc", "cannot be a folder name"),
        ("slug", "beta", "is the card of 'beta', expected 'alpha'"),
        ("dim", 1 << 40, "less than or equal to 16384"),
        ("dim", 9, "its fields give"),
        ("encoding", "float8", "float16"),
        ("digest", "0" * 16, "its fields give"),
    ],
)
def test_a_hostile_card_is_refused(small_store: Path, field: str, value: object, message: str) -> None:
    reseal(small_store / "teachers/alpha/zarr.json", lambda content: content.update({field: value}))
    with pytest.raises(CorruptStoreError, match=message):
        FeatureStore.open(small_store)


def test_a_folder_that_cannot_be_a_teacher_is_not_one(small_store: Path) -> None:
    shutil.copytree(small_store / "teachers/alpha", small_store / "teachers/.hidden..")
    assert list(FeatureStore.open(small_store).teachers) == ["alpha", "beta"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "null", '{"zarr_format": 3', "[" * 200_000, '{"attributes": [], "zarr_format": 3}', "\xff\xfe{}"],
    ids=["empty", "list", "number", "null", "cut", "deep", "attributes", "no utf-8"],
)
def test_metadata_that_is_no_object_is_refused(small_store: Path, text: str) -> None:
    (small_store / "zarr.json").write_text(text, encoding="latin-1")
    with pytest.raises((CorruptStoreError, NotAStoreError)):
        FeatureStore.open(small_store)


def test_a_member_named_twice_and_a_huge_file_are_refused(small_store: Path) -> None:
    path = small_store / "zarr.json"
    path.write_text(path.read_text().replace('"zarr_format": 3', '"zarr_format": 3, "zarr_format": 3'))
    with pytest.raises(CorruptStoreError, match="named twice"):
        FeatureStore.open(small_store)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptStoreError, match="expected at most 16777216"):
        FeatureStore.open(small_store)


def test_notes_of_other_tools_in_the_attributes_are_no_fault(small_store: Path) -> None:
    for name in ("", "teachers/alpha", "teachers/alpha/image"):
        node = zarr.open(small_store / name, mode="r+")
        node.attrs["note"] = "seen"
    assert not found(small_store)
    assert FeatureStore.open(small_store).available().all()


def test_array_metadata_that_claims_another_shape_is_found_and_mended(small_store: Path) -> None:
    path = small_store / "teachers/alpha/image/zarr.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"600", b"6000000000000000000"))
    (problem,) = verify(small_store).findings
    assert "(shape)" in problem.what
    assert FeatureStore.open(small_store).image("alpha").shape == (600, 8)  # ours does not ask it
    assert repair(small_store, verify(small_store)) == ("wrote teachers/alpha/image/zarr.json again",)
    assert path.read_bytes() == before


def test_a_replaced_file_leaves_a_mapping_as_it_was(small_store: Path) -> None:
    image = FeatureStore.open(small_store).image("alpha")
    before = np.array(image)
    other = small_store.parent / "other"
    make_store(other, 600, [make_card("alpha", 8)], seed=9)
    for name in ("teachers/alpha/image/loose/00000", "ledger/00000.alpha.json"):
        (other / name).replace(small_store / name)
    assert np.array_equal(image, before)
    assert not np.array_equal(FeatureStore.open(small_store).image("alpha")[:256], before[:256])


def test_errors_of_the_system_are_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot write"):
        make_store(tmp_path / "file" / "s", 3, [])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 700),
    dims=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    lost=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=3),
    seed=st.integers(0, 99),
)
def test_any_grid_reads_back_where_it_is_vouched_for(
    tmp_path: Path, rows: int, dims: list[int], lost: set[tuple[int, int]], seed: int
) -> None:
    root = tmp_path / "s"
    shutil.rmtree(root, ignore_errors=True)
    cards = [make_card(f"t{index}", dim) for index, dim in enumerate(dims)]
    made, written = make_store(root, rows, cards, seed)
    gone = np.zeros((-(-rows // 256), len(cards)), dtype=bool)
    for shard, teacher in lost:
        if shard < len(gone) and teacher < len(cards):
            (root / f"ledger/{shard:05d}.t{teacher}.json").unlink()
            gone[shard, teacher] = True
    store = FeatureStore.open(root)
    assert isinstance(made.record, StoreRecord)
    assert read_record(root) == made.record
    missing = np.repeat(gone, 256, axis=0)[:rows]
    assert np.array_equal(store.available(), ~missing)
    for index, card in enumerate(cards):
        for tower in ("image", "text"):
            values = getattr(store, tower)(card.slug)
            assert np.isnan(values[missing[:, index]]).all()
            assert np.array_equal(values[~missing[:, index]], written[f"{card.slug}/{tower}"][~missing[:, index]])
    report = verify(root, deep=True)
    assert report.sound
    assert len(report.orphans) == 3 * int(gone.sum())
