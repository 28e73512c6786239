"""The store: what is written is read, by us and by everyone else; what is not vouched for is not there."""

from __future__ import annotations

import gc
import json
import math
import mmap
import shutil
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
import tensorstore as ts
import zarr
from hypothesis import given
from hypothesis import strategies as st
from tiny_store import make_card, make_index, make_store

from mmkd.base.errors import (
    CorruptStoreError,
    FormatVersionError,
    NotAStoreError,
    StoreError,
    TeacherMismatchError,
    UserError,
)
from mmkd.store import FeatureStore
from mmkd.store.chunk import Run, can_map, encode_chunk, map_runs
from mmkd.store.fold import fold
from mmkd.store.layout import check_slug, rows_per_shard, shard_count, shards_per_pack
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.writer import add_teacher, create_store


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    _, written = make_store(tmp_path / "s", 600, [make_card("alpha", 8), make_card("beta", 16)])
    store = FeatureStore.open(tmp_path / "s")
    assert len(store) == 600
    assert list(store.teachers) == ["alpha", "beta"]
    for slug in store.teachers:
        assert np.array_equal(store.image(slug), written[f"{slug}/image"])
        assert np.array_equal(store.text(slug), written[f"{slug}/text"])
    assert store.available().shape == (600, 2)
    assert store.available().all()


def test_a_width_that_does_not_fill_pages_reads_the_same(tmp_path: Path) -> None:
    card = make_card("odd", 7)  # 256 rows x 7 x 2 bytes is no multiple of a page: the copying path
    assert not can_map(256 * 7 * 2)
    _, written = make_store(tmp_path / "s", 300, [card])
    image = FeatureStore.open(tmp_path / "s").image("odd")
    assert np.array_equal(image, written["odd/image"])
    assert not image.flags.writeable


def test_mapped_arrays_refuse_writing(small_store: Path) -> None:
    image = FeatureStore.open(small_store).image("alpha")
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        image.flags.writeable = True


def test_a_view_keeps_the_mapping_alive(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    expected = np.array(store.image("alpha")[599])
    row = store.image("alpha")[599]
    del store
    gc.collect()
    assert np.array_equal(row, expected)


def test_mapping_is_released_with_the_last_view(small_store: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(small_store))

    image = FeatureStore.open(small_store).image("alpha")
    assert maps() == 3  # one for each shard's chunk
    del image
    gc.collect()
    assert maps() == 0


def test_plain_zarr_reads_the_same_values(small_store: Path) -> None:
    fold(Store.open(small_store))
    store = FeatureStore.open(small_store)
    group = zarr.open_group(small_store, mode="r")
    array = group["teachers/beta/text"]
    assert array.shape == (600, 16)
    assert (array.chunks, array.shards) == ((256, 16), (32 * 256, 16))
    assert np.array_equal(array[:], store.text("beta"))
    assert np.array_equal(group["teachers/beta/valid"][:], store.valid("beta"))


def test_metadata_is_zarr_v3_with_packs_of_plain_bytes(small_store: Path) -> None:
    metadata = json.loads((small_store / "teachers/alpha/image/zarr.json").read_text())
    assert metadata["zarr_format"] == 3
    (codec,) = metadata["codecs"]
    assert codec["name"] == "sharding_indexed"
    assert codec["configuration"]["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    assert metadata["dimension_names"] == ["row", "feature"]
    assert metadata["fill_value"] == "NaN"
    assert (small_store / "teachers/alpha/image/loose/00000").stat().st_size == 256 * 8 * 2 + 4


def test_tensorstore_reads_the_same_values(small_store: Path) -> None:
    fold(Store.open(small_store))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(small_store / "teachers/alpha/image")}}
    values = ts.open(spec, read=True).result().read().result()
    assert np.array_equal(values, FeatureStore.open(small_store).image("alpha"))


def test_duckdb_and_polars_read_the_sample_rows(small_store: Path) -> None:
    parts = str(small_store / "samples" / "*.parquet")
    query = f"select count(*), min(row), max(row) from '{parts}' where status = 'ok'"
    assert duckdb.connect().execute(query).fetchall() == [(600, 0, 599)]
    frame = pl.read_parquet(parts)
    assert frame["key"].to_list() == [f"k{i}" for i in range(600)]
    assert frame["site"].value_counts().sort("site")["count"].to_list() == [200, 200, 200]


def test_chunk_bytes_are_those_of_zarr(tmp_path: Path) -> None:
    values = np.arange(32, dtype=np.float16).reshape(8, 4)
    array = zarr.create_array(
        tmp_path / "a",
        shape=(8, 4),
        chunks=(8, 4),
        dtype="float16",
        serializer=zarr.codecs.BytesCodec(endian="little"),
        compressors=zarr.codecs.Crc32cCodec(),
    )
    array[:] = values
    data, _ = encode_chunk(values)
    assert (tmp_path / "a/c/0/0").read_bytes() == data


def test_a_shard_without_ledger_entry_is_nan_and_unavailable(small_store: Path) -> None:
    (small_store / "ledger/00001.alpha.json").unlink()
    store = FeatureStore.open(small_store)
    available = store.available()
    assert not available[256:512, 0].any()
    assert available[:256, 0].all()
    assert available[512:, 0].all()
    assert available[:, 1].all()
    assert np.isnan(store.image("alpha")[256:512]).all()
    assert np.isfinite(store.image("alpha")[:256]).all()
    assert np.isfinite(store.image("alpha")[512:]).all()


def test_a_missing_chunk_is_an_error_not_a_zero(small_store: Path) -> None:
    (small_store / "teachers/alpha/image/loose/00001").unlink()
    with pytest.raises(CorruptStoreError, match=r"loose/00001 is missing although the ledger vouches for it"):
        FeatureStore.open(small_store).image("alpha")


def test_a_short_chunk_is_an_error_not_a_bus_error(small_store: Path) -> None:
    chunk = small_store / "teachers/alpha/image/loose/00001"
    chunk.write_bytes(chunk.read_bytes()[:1000])
    with pytest.raises(CorruptStoreError, match="has 1000 bytes, expected 4100"):
        FeatureStore.open(small_store).image("alpha")


def test_summary_counts(small_store: Path) -> None:
    (small_store / "ledger/00001.alpha.json").unlink()
    summary = FeatureStore.open(small_store).summary()
    assert summary.status == {"ok": 600}
    assert summary.teachers["alpha"].shards_done == 2
    assert summary.teachers["alpha"].rows == {"image": 256 + 88, "text": 256 + 88}
    assert summary.teachers["beta"].shards_done == 3
    assert not summary.complete


def test_opening_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="does not exist"):
        FeatureStore.open(tmp_path / "nothing")
    with pytest.raises(NotAStoreError, match=r"no zarr\.json"):
        FeatureStore.open(tmp_path)
    zarr.create_group(tmp_path / "foreign")
    with pytest.raises(NotAStoreError, match="not made by mmkd"):
        FeatureStore.open(tmp_path / "foreign")


@pytest.mark.parametrize(("version", "step"), [(3, "install a newer mmkd"), (1, "make it again")])
def test_another_format_is_refused(small_store: Path, version: int, step: str) -> None:
    path = small_store / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["mmkd"]["format"] = version
    path.write_text(json.dumps(metadata))
    with pytest.raises(FormatVersionError, match=f"format {version}, this mmkd reads format 2; {step}"):
        FeatureStore.open(small_store)


def test_unknown_teacher_and_column_name_what_is_there(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    with pytest.raises(UserError, match="no teacher 'gamma'; it has alpha, beta"):
        store.image("gamma")
    with pytest.raises(UserError, match=r"no sample column 'organ'; it has row, key, .*site"):
        store.sample_table(columns=["organ"])


def test_another_teacher_of_the_same_name_is_refused(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    add_teacher(store, make_card("alpha", 8))  # the same one: nothing happens
    other = make_card("alpha", 8, weights="ff")
    with pytest.raises(TeacherMismatchError) as caught:
        add_teacher(store, other)
    assert make_card("alpha", 8).digest in str(caught.value)
    assert other.digest in str(caught.value)


def test_a_folder_with_strangers_is_not_made_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    corpus = CorpusRecord(kind="test", location="here", root="/", rows=10, labels=("site",), digest="d")
    with pytest.raises(StoreError, match=r"found thesis\.tex"):
        create_store(tmp_path, corpus, make_index(10))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_moved_store_reads_the_same(small_store: Path, tmp_path: Path) -> None:
    before = np.array(FeatureStore.open(small_store).image("beta"))
    moved = tmp_path / "elsewhere"
    shutil.move(small_store, moved)
    assert np.array_equal(FeatureStore.open(moved).image("beta"), before)


def test_repr_says_how_far_it_is(small_store: Path) -> None:
    assert "600 rows in 3 shards, 2 teachers, 6/6 shards extracted" in repr(FeatureStore.open(small_store))


@given(st.integers(min_value=1, max_value=10_000_000))
def test_rows_per_shard_is_a_power_of_two_giving_about_eight(rows: int) -> None:
    per_shard = rows_per_shard(rows)
    assert per_shard & (per_shard - 1) == 0
    assert 256 <= per_shard <= 16384
    if 256 * 8 <= rows <= 16384 * 8:
        assert 4 < shard_count(rows, per_shard) <= 8


def test_rows_per_shard_known_values() -> None:
    assert [rows_per_shard(n) for n in (1, 2048, 2049, 4096, 131072, 131073, 2_900_000)] == [
        256,
        256,
        512,
        512,
        16384,
        16384,
        16384,
    ]


@given(st.integers(min_value=1, max_value=10**10), st.integers(min_value=1, max_value=5000))
def test_all_workers_are_busy_unless_the_format_forbids_it(rows: int, workers: int) -> None:
    per_shard = rows_per_shard(rows, workers)
    shards = shard_count(rows, per_shard)
    assert per_shard & (per_shard - 1) == 0
    assert 256 <= per_shard <= 16384
    assert shards <= 1 << 20
    if per_shard > 256 and shards < 1 << 16:
        assert shards >= 4 * workers
        assert math.ceil(shards / workers) * workers <= 1.1 * shards
    if per_shard < rows_per_shard(rows):  # twice the rows would leave workers without
        fewer = shard_count(rows, 2 * per_shard)
        assert fewer < 4 * workers or math.ceil(fewer / workers) * workers > 1.1 * fewer


def test_rows_per_shard_of_many_workers() -> None:
    found = [rows_per_shard(2_900_000, workers) for workers in (1, 8, 64, 512, 4096)]
    assert found == [16384, 16384, 8192, 1024, 256]
    assert shard_count(2_900_000, 1024) == 2833  # 5.53 for each of 512: six rounds


def test_packs_of_small_shards_hold_as_many_rows() -> None:
    sizes = [(2_900_000, 16384), (2_900_000, 1024), (10**8, 256), (600, 256), (10_000, 256)]
    assert [shards_per_pack(rows, per_shard) for rows, per_shard in sizes] == [32, 512, 2048, 32, 64]


def test_more_shards_than_a_store_may_have(tmp_path: Path) -> None:
    corpus = CorpusRecord(kind="t", location="l", root="/", rows=256 << 20 | 1, digest="d")
    with pytest.raises(UserError, match=r"^268,435,457 rows are more than 1,048,576 shards of 256, which a store may"):
        create_store(tmp_path / "s", corpus, make_index(0), 256)


@pytest.mark.parametrize("slug", ["", "../up", "a/b", ".hidden", "UPPER", "a" * 65, "a..b", "with space"])
def test_slugs_that_could_leave_the_store_are_refused(slug: str) -> None:
    with pytest.raises(UserError, match="cannot be a folder name"):
        check_slug(slug)


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(min_value=1, max_value=3))
def test_mapped_span_equals_concatenation(present: list[bool], pages: int) -> None:
    import tempfile

    size = pages * mmap.PAGESIZE
    filler = bytes([7]) * size
    with tempfile.TemporaryDirectory() as folder:
        runs: list[Run] = []
        expected = b""
        for index, there in enumerate(present):
            body = bytes([index + 10]) * size
            path = Path(folder) / str(index)
            path.write_bytes(body + b"crc!")
            runs.append(Run(path if there else None, 0, 1, size + 4 if there else None))
            expected += body if there else filler
        assert map_runs(runs, len(present), size, lambda: filler).tobytes() == expected
