"""Verifying a store: one flipped bit is named, a sample of shards is said to be one, rows marked sound are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_store import make_card, make_store

from mmkd.base.errors import (
    CorruptStoreError,
)
from mmkd.store import FeatureStore
from mmkd.store.chunk import encode_chunk


def test_verify_accepts_a_sound_store(small_store: Path) -> None:
    report = FeatureStore.open(small_store).verify()
    assert report.sound
    assert report.entries == 6


@pytest.mark.parametrize(
    "name",
    [
        "teachers/alpha/image/loose/00000",
        "teachers/beta/text/loose/00002",
        "teachers/alpha/valid/loose/00001",
        "samples/00001.parquet",
        "ledger/00002.beta.json",
    ],
)
def test_verify_names_a_file_with_one_flipped_bit(small_store: Path, name: str) -> None:
    path = small_store / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x04
    path.write_bytes(data)
    try:
        problems = FeatureStore.open(small_store).verify().problems
    except CorruptStoreError as error:
        problems = (str(error),)
    assert problems
    named = ("shard 2 of beta", name) if name.startswith("ledger") else (name,)
    assert any(part in problem for problem in problems for part in named)


def test_a_sample_of_shards_is_read_whole_and_said(small_store: Path) -> None:
    from mmkd.store.verify import drawn_shards

    assert [len(drawn_shards(3, n, seed=0)) for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert drawn_shards(1000, 10, seed=1) == drawn_shards(1000, 10, seed=1) != drawn_shards(1000, 10, seed=2)
    seed = next(seed for seed in range(99) if drawn_shards(3, 1, seed) == {1})
    store = FeatureStore.open(small_store)
    report = store.verify(sample=1, seed=seed)
    assert (report.sound, report.entries, report.shards, report.all_shards) == (True, 2, 1, 3)
    for name in ("teachers/alpha/image/loose/00002", "samples/00002.parquet", "teachers/beta/text/loose/00001"):
        path = small_store / name
        data = bytearray(path.read_bytes())
        data[-9] ^= 0x04
        path.write_bytes(data)
    (problem,) = store.verify(sample=1, seed=seed).findings
    assert (problem.shard, problem.teacher, problem.file) == (1, "beta", "teachers/beta/text/loose/00001")
    assert len({finding.shard for finding in store.verify().findings}) == 2


def test_what_is_not_sampled_is_metadata_entries_and_names(small_store: Path) -> None:
    from mmkd.store.verify import drawn_shards, verify

    seed = next(seed for seed in range(99) if drawn_shards(3, 1, seed) == {0})
    (small_store / "ledger/00002.beta.json").write_text("{")
    (small_store / "teachers/alpha/image/zarr.json").write_text("{}")
    (small_store / "samples/stranger").write_text("")
    report = verify(small_store, sample=1, seed=seed)
    assert {finding.file for finding in report.findings} == {
        "ledger/00002.beta.json", "teachers/alpha/image/zarr.json"
    }  # fmt: skip
    assert report.orphans == (
        "samples/stranger",
        *(f"teachers/beta/{name}/loose/00002" for name in ("image", "text", "valid")),
    )


def write_image(root: Path, image: np.ndarray) -> None:
    """Write 100 rows of image features to shard 0 of alpha, all offered as sound."""
    from mmkd.store.samples import read_part
    from mmkd.store.writer import ShardFeatures, write_shard

    store = FeatureStore.open(root)
    _, sha = read_part(root, 0)
    features = ShardFeatures(image, np.ones((100, 8), dtype=np.float16), np.full(100, 3, dtype=np.uint8))
    write_shard(store, store.card("alpha"), 0, features, sha)


def test_what_the_encoding_cannot_hold_is_written_as_missing(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 100, [make_card("alpha", 8)])
    image = np.ones((100, 8), dtype=np.float32)
    image[3], image[5], image[7] = 0, 70000, 1e-30
    write_image(tmp_path / "s", image)
    store = FeatureStore.open(tmp_path / "s")
    assert np.flatnonzero(store.valid("alpha") != 3).tolist() == [3, 5, 7]
    assert np.flatnonzero(np.isnan(store.image("alpha")).all(axis=1)).tolist() == [3, 5, 7]
    assert store.ledger[0, "alpha"].image_rows == 97
    assert store.verify(deep=True).sound


def test_verify_finds_rows_that_are_marked_sound_but_are_not(tmp_path: Path) -> None:

    root = tmp_path / "s"
    make_store(root, 100, [make_card("alpha", 8)])
    image = np.full((256, 8), np.nan, dtype=np.float16)
    image[:100] = 1
    write_image(root, image[:100])
    image[3], image[5] = 0, np.inf
    entry = root / "ledger/00000.alpha.json"
    data, crc = encode_chunk(image)
    (root / "teachers/alpha/image/loose/00000").write_bytes(data)
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"image_crc32c": crc}))
    assert FeatureStore.open(root).verify().sound  # the bytes are those that were vouched for
    (problem,) = FeatureStore.open(root).verify(deep=True).problems
    assert "2 rows are marked sound but are zero or not finite" in problem


def test_verify_counts_left_over_temporary_files(small_store: Path) -> None:
    (small_store / "teachers/alpha/image/loose/.0.123-abcd.mmkd-tmp").write_bytes(b"half")
    report = FeatureStore.open(small_store).verify()
    assert report.sound
    assert report.temporary == ("teachers/alpha/image/loose/.0.123-abcd.mmkd-tmp",)
