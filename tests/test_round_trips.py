"""What goes out of a store and comes back is equal in every field, or the loss is named and asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_store import compare, random_store
from safetensors.numpy import load_file
from tiny_store import make_card, make_store

from mmkd.base.errors import UserError
from mmkd.store import FeatureStore
from mmkd.store.convert.clip_retrieval import ClipRetrievalFolder, export_npy
from mmkd.store.convert.exports import export_archive, export_parquet, export_safetensors
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.original import FILES, OriginalRelease
from mmkd.store.convert.original_export import ImageMode, OriginalReport, export_original
from mmkd.store.convert.rows import StoreRows, chosen_rows
from mmkd.store.convert.torch_file import write_tensors
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.writer import move_corpus

few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inputs(store: FeatureStore) -> np.ndarray:
    """Grid rows that are no gap."""
    return np.concatenate([np.arange(span.rows.start, span.rows.stop) for span in store.record.spans()])


def silent(done: int, every: int) -> None:
    """Progress of no interest."""


@few
@given(seed=st.integers(0, 10**6), corpora=st.integers(1, 3))
def test_a_subset_has_every_field_of_its_rows(
    tmp_path_factory: pytest.TempPathFactory, seed: int, corpora: int
) -> None:
    folder = tmp_path_factory.mktemp("subset")
    store = random_store(folder / "st", seed, corpora=corpora)
    rows = inputs(store)
    rows = rows[np.random.default_rng(seed).random(len(rows)) < 0.7]
    if len(rows):
        import_features(StoreRows([(store, rows)], allow_loss=["extraction"]), folder / "out", None, silent)
        found = FeatureStore.open(folder / "out")
        assert found.verify(deep=True).sound
        compare(found, store, rows, list(store.teachers))


@pytest.mark.integration
@few
@given(seed=st.integers(0, 10**6), corpora=st.integers(1, 3))
def test_npy_and_back_has_every_field(tmp_path_factory: pytest.TempPathFactory, seed: int, corpora: int) -> None:
    folder = tmp_path_factory.mktemp("npy")
    store = random_store(folder / "st", seed, corpora=corpora)
    export_npy(store, folder / "npy", ["extraction"])
    for slug in store.teachers:
        import_features(ClipRetrievalFolder(folder / "npy" / slug, "other"), folder / slug, None, silent)
        found = FeatureStore.open(folder / slug)
        assert found.verify(deep=True).sound
        compare(found, store, inputs(store), [slug])


@pytest.mark.integration
@few
@given(seed=st.integers(0, 10**6), corpora=st.integers(1, 3))
def test_a_merge_has_every_field_of_both(tmp_path_factory: pytest.TempPathFactory, seed: int, corpora: int) -> None:
    folder = tmp_path_factory.mktemp("merge")
    stores = [random_store(folder / name, seed, corpora=corpora) for name in "ab"]
    for shard in range(stores[1].shards):
        table, _ = read_part(folder / "b", shard)
        write_part(folder / "b", shard, with_columns(table, {"key": [f"b{key}" for key in table["key"].to_pylist()]}))
    rows = inputs(stores[0])
    import_features(StoreRows([(one, rows) for one in stores], allow_loss=["extraction"]), folder / "out", None, silent)
    found = FeatureStore.open(folder / "out")
    assert found.verify(deep=True).sound
    tables = [one.sample_table().take(pa.array(rows)) for one in stores]
    expected = pa.concat_tables(tables).to_pylist()
    assert found.sample_table().to_pylist() == [row | {"row": number} for number, row in enumerate(expected)]
    for slug, card in found.teachers.items():
        for tower in card.towers:
            theirs = np.concatenate([one.features(slug, tower)[rows] for one in stores])  # type: ignore[arg-type]
            assert np.array_equal(found.features(slug, tower)[:], theirs, equal_nan=True)  # type: ignore[arg-type]


@few
@given(seed=st.integers(0, 10**6), corpora=st.integers(1, 3))
def test_exports_that_nothing_imports_hold_every_field(
    tmp_path_factory: pytest.TempPathFactory, seed: int, corpora: int
) -> None:
    folder = tmp_path_factory.mktemp("exports")
    store = random_store(folder / "st", seed, corpora=corpora)
    rows = inputs(store)
    export_parquet(store, folder / "parquet", ["extraction"])
    table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "parquet/data").iterdir())])
    samples = store.sample_table()
    assert table.select(samples.column_names).to_pylist() == samples.take(pa.array(rows)).to_pylist()
    export_archive(store, folder / "archive", "gzip", ["extraction"])
    archive = zarr.open_group(folder / "archive", mode="r")
    parts = [pq.read_table(path) for path in sorted((folder / "archive/samples").iterdir())]
    assert pa.concat_tables(parts).to_pylist() == samples.take(pa.array(rows)).to_pylist()
    export_safetensors(store, folder / "safetensors", ["extraction"])
    copied = [pq.read_table(path) for path in sorted((folder / "safetensors/samples").iterdir())]
    assert pa.concat_tables(copied).to_pylist() == samples.take(pa.array(rows)).to_pylist()
    for slug in store.teachers:
        files = [load_file(path) for path in sorted((folder / "safetensors" / slug).iterdir())]
        valid = store.valid(slug)
        assert np.array_equal(archive[f"teachers/{slug}/valid"][:], valid)
        assert np.array_equal(np.concatenate([one["row"] for one in files]), rows)
        assert np.array_equal(np.concatenate([one["valid"] for one in files]), valid[rows])
        for tower, bit in store.card(slug).sound_bits.items():
            features = np.asarray(store.features(slug, tower)[:])  # type: ignore[arg-type]
            assert np.array_equal(archive[f"teachers/{slug}/{tower}"][:], features, equal_nan=True)
            stored = np.concatenate([one[tower] for one in files])
            assert np.array_equal(stored, features[rows], equal_nan=True)
            expected = [list(features[row]) if valid[row] & bit else None for row in rows]
            assert table[f"{slug}_{tower}"].to_pylist() == expected


@pytest.mark.integration
@few
@given(seed=st.integers(0, 10**6))
def test_the_releases_layout_and_back_has_all_but_the_columns_that_it_names(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("release")
    store = random_store(folder / "st", seed)
    sound = np.stack([store.valid(slug) for slug in store.teachers])
    rows = np.flatnonzero(sound.any(axis=0))
    assume(len(rows))  # of none there are no keys and columns to lose
    complete = [slug for slug, bits in zip(store.teachers, sound == 3, strict=True) if bits.any()]
    expected = store.sample_table().take(pa.array(rows)).to_pylist()
    lossy = ("offset", "length", "reason", "width", "height", "image_sha256")
    lost = {name: sum(row[name] is not None for row in expected) for name in lossy}
    lost["status"] = sum(row["status"] != "ok" for row in expected)
    with pytest.raises(UserError) as refused:
        export_original(store, folder / "release")
    assert not (folder / "release").exists()
    said, accepted = str(refused.value).split("; nothing was written: add --allow-loss ")
    assert set(re.findall(r"(\w+) of (\d+) row", said.partition("column values ")[2].partition(";")[0])) == {
        (name, str(count)) for name, count in lost.items() if count
    }
    kinds = accepted.removesuffix(" to accept this").split(",")
    assert {"cards", "keys", "columns"} <= set(kinds)
    assert ("rows" in kinds) == (len(rows) < len(store))
    report = export_original(store, folder / "release", allow_loss=kinds)
    assert (report.samples, report.left_out) == (len(rows), len(store) - len(rows))
    if complete:
        import_features(OriginalRelease(folder / "release"), folder / "back", "float16", silent)
        back = FeatureStore.open(folder / "back")
        names = [name for name in ("caption", "modality", "uri", "site", "own_0") if name in back.samples.schema.names]
        assert back.sample_table(names).to_pylist() == [{name: row[name] for name in names} for row in expected]
        assert back.sample_table()["key"].to_pylist() == [f"mmkd/{row['key']}" for row in expected]
        assert list(back.teachers) == complete
        for slug in complete:
            for tower in ("image", "text"):
                theirs = store.features(slug, tower)[rows]  # type: ignore[arg-type]
                assert np.array_equal(back.features(slug, tower)[:], theirs, equal_nan=True)  # type: ignore[arg-type]


def test_rows_that_are_not_extracted_are_named_and_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "st"
    make_store(root, 600, [make_card()])
    (root / "ledger/00001.alpha.json").unlink()
    store = FeatureStore.open(root)
    every = np.arange(600)
    with pytest.raises(
        UserError, match=r"without features of alpha for 256 of 600 rows .*\(shard 1 .*--allow-loss extraction to"
    ):
        StoreRows([(store, every)])
    StoreRows([(store, every[:256])])
    StoreRows([(store, every)], allow_loss=["extraction"])
    StoreRows([(store, every)], teachers=[])


def test_a_teacher_that_only_one_store_has_is_named(tmp_path: Path) -> None:
    make_store(tmp_path / "a", 10, [make_card()])
    make_store(tmp_path / "b", 10, [make_card(), make_card("beta")])
    a, b = FeatureStore.open(tmp_path / "a"), FeatureStore.open(tmp_path / "b")
    rows = np.arange(10)
    with pytest.raises(UserError, match=r"b has beta, .*a has not; .*--teachers alpha"):
        StoreRows([(a, rows), (b, rows)])
    with pytest.raises(UserError, match="no teacher 'beta'"):
        StoreRows([(b, rows), (a, rows)])
    StoreRows([(b, rows), (a, rows)], teachers=["alpha"])


def test_a_failed_row_may_repeat_a_key(tmp_path: Path) -> None:
    root = tmp_path / "st"
    make_store(root, 4, [])
    table, _ = read_part(root, 0)
    twice = {
        "key": ["a", "b", "a", "c"],
        "status": ["ok", "ok", "failed", "ok"],
        "reason": [None, None, "key: a", None],
    }
    write_part(root, 0, with_columns(table, twice))
    store = FeatureStore.open(root)
    import_features(StoreRows([(store, chosen_rows(store))]), tmp_path / "out", None, silent)
    assert FeatureStore.open(tmp_path / "out").sample_table(["key", "status"]).to_pydict() == {
        "key": twice["key"],
        "status": twice["status"],
    }


def test_metadata_columns_of_any_type_and_any_part_are_labels(tmp_path: Path) -> None:
    parts = [
        pa.table({"caption": ["a", "b"], "age": pa.array([1, None], pa.int16()), "status": ["success", "success"]}),
        pa.table(
            {
                "caption": ["c"],
                "site": pa.array(["x"]).dictionary_encode(),
                "long": pa.array(["y"], pa.large_string()),
                "tags": [["p", "q"]],
                "share": [0.5],
                "flag": [True],
            }
        ),
    ]
    for number, part in enumerate(parts):
        for name in ("metadata", "img_emb"):
            (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(part, tmp_path / f"in/metadata/metadata_{number}.parquet")
        np.save(tmp_path / f"in/img_emb/img_emb_{number}.npy", np.ones((len(part), 3), np.float32))
    import_features(ClipRetrievalFolder(tmp_path / "in", "m"), tmp_path / "out", None, silent)
    found = FeatureStore.open(tmp_path / "out").sample_table()
    assert found["age"].to_pylist() == ["1", None, None]
    assert found["metadata_status"].to_pylist() == ["success", "success", None]
    assert found["status"].to_pylist() == ["ok"] * 3
    for name, text in {"site": "x", "long": "y", "tags": '["p", "q"]', "share": "0.5", "flag": "true"}.items():
        assert found[name].to_pylist() == [None, None, text], name


def test_a_label_does_not_share_its_name_with_a_teachers_features(tmp_path: Path) -> None:
    store = random_store(tmp_path / "st", 3, complete=True)
    root = tmp_path / "named"
    source = StoreRows([(store, inputs(store))])
    source.labels = ("site", "t0_image")
    import_features(source, root, None, silent)
    export_parquet(FeatureStore.open(root), tmp_path / "out")
    names = pq.read_table(next((tmp_path / "out/data").iterdir())).column_names
    assert len(set(names)) == len(names)
    assert {"t0_image", "t0_image_features", "t0_text"} <= set(names)


class ReleaseLoader:
    """The release's data set as it is described: one random teacher of each sample, and the image below the root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        lines = (root / "meta.jsonl").read_text("utf-8").split("\n")
        self.samples = [json.loads(line) for line in lines if line]

    def __getitem__(self, index: int) -> tuple[bytes, str, np.ndarray, np.ndarray]:
        sample = self.samples[index]
        folder = self.root / "features" / sample["folderid"] / sample["id"]
        tensors = torch.load(folder / "clips_project_output.pt", weights_only=True)
        name = sample["available_clips"][0]
        image = (self.root / sample["imgpath"]).read_bytes()
        return image, sample["txt"], tensors[f"{name}_img"].numpy(), tensors[f"{name}_txt"].numpy()


@pytest.mark.parametrize("images", ["link", "copy"])
def test_the_releases_loader_reads_an_export(tmp_path: Path, images: ImageMode) -> None:
    (tmp_path / "img" / "p").mkdir(parents=True)
    features = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16)
    for row in range(3):
        (tmp_path / f"img/p/{row}.png").write_bytes(b"picture %d" % row)
    root = tmp_path / "st"
    made = {f"{slug}/{tower}": features for slug in ("alpha", "beta") for tower in ("image", "text")}
    make_store(root, 3, [make_card("alpha"), make_card("beta")], features=made)
    move_corpus(root, tmp_path / "img")
    table, _ = read_part(root, 0)
    write_part(root, 0, with_columns(table, {"uri": ["p/0.png", "p/1.png", "p/gone.png"]}))
    report = export_original(FeatureStore.open(root), tmp_path / "out", FILES, images, ["cards", "keys"])
    assert report == OriginalReport(samples=3, left_out=0, images=2, images_missing=1)
    loader = ReleaseLoader(tmp_path / "out")
    for row in range(2):
        image, text, left, right = loader[row]
        assert (image, text) == (b"picture %d" % row, f"caption {row}")
        assert np.array_equal(left.ravel(), features[row])
        assert np.array_equal(right.ravel(), features[row])


def test_an_export_has_the_file_and_the_order_of_the_import(tmp_path: Path) -> None:
    tensors = {f"{name}_{side}": np.ones(4, np.float32) for name in ("Zeta", "Alpha") for side in ("img", "txt")}
    folder = tmp_path / "in/features/f/i"
    folder.mkdir(parents=True)
    (folder / "clips_project_output.pt").write_bytes(write_tensors(tensors, "clips_project_output"))
    line = {"folderid": "f", "id": "i", "imgpath": "a.png", "metapath": "m", "txt": "x"}
    (tmp_path / "in/meta.jsonl").write_text(json.dumps(line | {"available_clips": ["Zeta", "Alpha"]}) + "\n")
    source = OriginalRelease(tmp_path / "in", "clips_project_output")
    import_features(source, tmp_path / "st", "float32", silent)
    export_original(FeatureStore.open(tmp_path / "st"), tmp_path / "out")
    for name in ("meta.jsonl", "features/f/i/clips_project_output.pt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
    assert not (tmp_path / "out/features/f/i/clips_output.pt").exists()
