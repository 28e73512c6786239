"""Exports are read by the tools they are for, and give what the store holds; imports bring them back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
from gappy_store import ANY, mmkd
from safetensors import safe_open

from mmkd.store import FeatureStore
from mmkd.store.card import TeacherCard


def same(store: FeatureStore, other: FeatureStore, card: TeacherCard, name: str) -> None:
    """Both hold the same of one teacher."""
    assert np.array_equal(store.valid(card.slug), other.valid(name))
    for tower in ("image", "text"):
        assert np.array_equal(getattr(store, tower)(card.slug), getattr(other, tower)(name), equal_nan=True)


def test_npy_goes_out_and_comes_back(gappy: FeatureStore, tmp_path: Path) -> None:
    assert mmkd("export", gappy.root, tmp_path / "out", "--layout", "npy", *ANY).output.startswith("4 parts")
    image = np.concatenate([np.load(tmp_path / f"out/alpha/img_emb/img_emb_{i}.npy") for i in range(2)])
    assert np.array_equal(image, gappy.image("alpha"), equal_nan=True)
    for slug, card in gappy.teachers.items():
        arguments = ("--name", slug, "--encoding", card.encoding, "--json")
        done = mmkd("import", tmp_path / "out" / slug, tmp_path / slug, *arguments)
        assert json.loads(done.output)["rows"] == 300
        back = FeatureStore.open(tmp_path / slug)
        same(gappy, back, card, slug)
        assert back.sample_table(["key", "caption", "site"]) == gappy.sample_table(["key", "caption", "site"])
        assert back.verify(deep=True).sound


def test_npy_folders_of_other_part_sizes_come_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    everything = rng.normal(size=(700, 6)).astype(np.float16)
    source, start = tmp_path / "in", 0
    for name in ("metadata", "img_emb"):
        (source / name).mkdir(parents=True)
    for part, rows in enumerate((1, 299, 400)):
        values = everything[start : start + rows]
        np.save(source / f"img_emb/img_emb_{part}.npy", values)
        paths = [f"{part}/{i}.jpg" for i in range(rows)]
        pl.DataFrame({"image_path": paths}).write_parquet(source / f"metadata/metadata_{part}.parquet")
        start += rows
    assert mmkd("import", source, tmp_path / "s").exit_code == 0
    store = FeatureStore.open(tmp_path / "s")
    assert np.array_equal(store.image("clip-retrieval"), everything)
    assert store.card("clip-retrieval").towers == ("image",)
    assert (store.valid("clip-retrieval") == 1).all()
    assert store.sample_table(["key", "uri"]).slice(299, 2).to_pylist() == [
        {"key": "1/298", "uri": "1/298.jpg"},
        {"key": "2/0", "uri": "2/0.jpg"},
    ]


def test_parquet_has_every_row_and_null_where_missing(gappy: FeatureStore, tmp_path: Path) -> None:
    assert mmkd("export", gappy.root, tmp_path / "out", "--layout", "parquet", *ANY).exit_code == 0
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "out/data")
    assert table.select(gappy.samples.schema.names).equals(gappy.sample_table())
    for slug in gappy.teachers:
        for bit, tower in enumerate(("image", "text")):
            column = table[f"{slug}_{tower}"].combine_chunks()
            sound = (gappy.valid(slug) >> bit & 1).astype(bool)
            assert np.array_equal(~np.array(column.is_null()), sound)
            values = np.array([row for row in column.to_pylist() if row is not None])
            assert np.array_equal(values, getattr(gappy, tower)(slug)[sound])


def test_safetensors_reads_its_files(gappy: FeatureStore, tmp_path: Path) -> None:
    assert mmkd("export", gappy.root, tmp_path / "out", "--layout", "safetensors", *ANY).output.startswith("4 files")
    for slug, card in gappy.teachers.items():
        for shard, rows in enumerate((slice(0, 256), slice(256, 300))):
            with safe_open(tmp_path / f"out/{slug}/{shard:05d}.safetensors", "numpy") as file:
                assert file.metadata()["digest"] == card.digest
                assert np.array_equal(file.get_tensor("image"), gappy.image(slug)[rows], equal_nan=True)
                assert np.array_equal(file.get_tensor("text"), gappy.text(slug)[rows], equal_nan=True)
                assert np.array_equal(file.get_tensor("valid"), gappy.valid(slug)[rows])
                assert np.array_equal(file.get_tensor("row"), np.arange(rows.start, rows.stop))


def test_the_original_layout_goes_out_and_comes_back(gappy: FeatureStore, tmp_path: Path) -> None:
    # Row 5 has beta still; rows 256 on have alpha only.
    assert mmkd("export", gappy.root, tmp_path / "out", "--layout", "original", *ANY).output.startswith("300 samples")
    assert mmkd("import", tmp_path / "out", tmp_path / "back", "--encoding", "float32").exit_code == 0
    back = FeatureStore.open(tmp_path / "back")
    for card in gappy.teachers.values():
        same(gappy, back, card, card.slug)


def test_mistakes_are_one_line(gappy: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    done = mmkd("export", gappy.root, tmp_path / "full", "--layout", "npy", *ANY)
    assert "is there already; name a new folder" in str(done.exception)
    done = mmkd("import", tmp_path / "full", tmp_path / "new")
    assert "holds neither meta.jsonl" in str(done.exception)
    assert not (tmp_path / "new").exists()
