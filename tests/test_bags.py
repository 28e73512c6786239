"""Bags of CLAM and TRIDENT into a store: equal values, labels by slide, and files that are no bags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.base.errors import ConfigError, CorpusError, UserError
from mmkd.cli.store.convert import _source
from mmkd.extract.corpora import open_corpus
from mmkd.store import FeatureStore
from mmkd.store.convert.bags import BagFolder
from mmkd.store.convert.clip_retrieval import ClipRetrievalFolder, export_npy
from mmkd.store.convert.exports import export_parquet
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.rows import StoreRows

h5py = pytest.importorskip("h5py", reason="the extra wsi is not installed")


def write_bag(path: Path, patches: int, dim: int = 6, batched: bool = False, seed: int = 0) -> np.ndarray:
    """A bag as CLAM writes it, or TRIDENT's with a leading axis."""
    values = np.random.default_rng(seed).normal(size=(patches, dim)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["features"] = values[None] if batched else values
        file["coords"] = np.stack([np.arange(patches) * 512, np.full(patches, 1024)], axis=1)
    return values


def test_bags_come_in_equal(tmp_path: Path) -> None:
    bags = tmp_path / "bags"
    bags.mkdir()
    first = write_bag(bags / "TCGA-AB-1234-01Z.h5", 300)
    second = write_bag(bags / "other.h5", 40, batched=True, seed=1)
    source = _source(bags, "clips_output", "uni")  # as `mmkd store import` finds out what the folder is
    import_features(source, tmp_path / "s", "float32", lambda *_: None)
    store = FeatureStore.open(tmp_path / "s")
    assert np.array_equal(store.image("uni"), np.concatenate([first, second]))
    rows = store.sample_table().to_pylist()
    assert (rows[1]["key"], rows[1]["patient"], rows[1]["x"], rows[1]["y"]) == (
        "TCGA-AB-1234-01Z#512,1024",
        "TCGA-AB-1234",
        "512",
        "1024",
    )
    assert [row["slide"] for row in rows].count("other") == 40
    assert store.verify().sound


def test_bags_come_in_as_int8(tmp_path: Path) -> None:
    values = write_bag(tmp_path / "a.h5", 30)
    import_features(BagFolder(tmp_path, "uni"), tmp_path / "s", "int8", lambda *_: None)
    store = FeatureStore.open(tmp_path / "s")
    steps = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(store.image("uni")[:] - values) <= steps * 0.501).all()
    assert store.sample_table(["reason"])["reason"].null_count == 30
    assert store.card("uni").towers == ("image",)
    assert not (tmp_path / "s/teachers/uni/text").exists()


def test_a_patch_that_is_not_finite_is_missing(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", 5)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["features"][2, 0] = np.nan
    import_features(BagFolder(tmp_path, "uni"), tmp_path / "s", "float32", lambda *_: None)
    rows = FeatureStore.open(tmp_path / "s").sample_table().to_pylist()
    assert [row["reason"] for row in rows] == [None, None, "features: not finite", None, None]
    assert FeatureStore.open(tmp_path / "s").valid("uni").tolist() == [1, 1, 0, 1, 1]


def test_an_empty_bag_is_a_failed_row(tmp_path: Path) -> None:
    first = write_bag(tmp_path / "a.h5", 3)
    write_bag(tmp_path / "b.h5", 0)
    last = write_bag(tmp_path / "c.h5", 2, seed=1)
    import_features(BagFolder(tmp_path, "uni"), tmp_path / "s", "float32", lambda *_: None)
    store = FeatureStore.open(tmp_path / "s")
    rows = store.sample_table().to_pylist()
    assert [(row["key"], row["slide"], row["reason"]) for row in rows[3:5]] == [
        ("b", "b", "features: bag without patches"), ("c#0,1024", "c", None),
    ]  # fmt: skip
    assert store.valid("uni").tolist() == [1, 1, 1, 0, 1, 1]
    assert np.array_equal(np.delete(store.image("uni"), 3, axis=0), np.concatenate([first, last]))


def random_bags(folder: Path, names: list[str], rng: np.random.Generator, dim: int) -> list[dict[str, object]]:
    """Write bags of every form, some empty, broken or with attributes; return the rows that they should become."""
    folder.mkdir()
    rows: list[dict[str, object]] = []
    noted = {"patch_size": (256, "256"), "magnification": (20.0, "20.0"), "tool": ("a|b\u2028", "a|b\u2028"),
             "size": (np.array([1, 2]), "[1, 2]"), "none": (h5py.Empty("f"), None)}  # fmt: skip
    for name in sorted(names):
        patches = int(rng.choice([0, 1, 3, 200]))
        values = rng.normal(size=(patches, dim)).astype(rng.choice(["<f2", "<f4"]))
        broken = rng.random(patches) < 0.2
        values[broken] = rng.choice([0, np.nan, np.inf])
        corners = rng.permutation(1000)[: 2 * patches].reshape(patches, 2) * 256
        kind = str(rng.choice(["<i4", "<u8", "<f8", ">i8"]))
        shift = 0.5 if kind == "<f8" and rng.random() < 0.5 else 0
        own = {key: noted[key] for key in noted if rng.random() < 0.5}
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"] = values[None] if rng.random() < 0.5 else values
            file["coords"] = (corners + shift).astype(kind)
            file["coords"].attrs.update({key: value for key, (value, _) in own.items()})
        labels = {"slide": name} | {f"coords_{key}": text for key, (_, text) in own.items()}
        texts = [[str(value + shift) for value in corner] for corner in corners.tolist()]
        rows += [labels | {"key": f"{name}#{x},{y}", "x": x, "y": y, "feature": None if bad else value}
                 for (x, y), value, bad in zip(texts, values, broken, strict=True)]  # fmt: skip
        rows += [labels | {"key": name, "feature": None}] * (not patches)
    return rows


def held(store: FeatureStore, rows: list[dict[str, object]]) -> None:
    """Hold a store of `uni` to these rows."""
    table = store.sample_table().to_pylist()
    assert [row["key"] for row in table] == [row["key"] for row in rows]
    for found, row in zip(table, rows, strict=True):
        assert (found["status"], found["modality"]) == ("ok" if row["feature"] is not None else "failed", "pathology")
        labels = {name: found.get(name) for name in ("slide", "x", "y", *(n for n in found if n.startswith("coords_")))}
        assert labels == {name: row.get(name) for name in labels}
    image = store.features("uni", "image")[:]  # type: ignore[arg-type]
    for value, row in zip(image, rows, strict=True):
        expected = np.full(len(value), np.nan) if row["feature"] is None else row["feature"]
        assert np.array_equal(value, expected, equal_nan=True)
    assert store.verify(deep=True).sound


@pytest.mark.integration
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_random_bags_keep_every_field_through_every_converter(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder, rng = tmp_path_factory.mktemp("bags"), np.random.default_rng(seed)
    silent, dim = (lambda *_: None), int(rng.integers(2, 6))
    parts = {name: random_bags(folder / name, [f"{name}{i}" for i in range(int(rng.integers(1, 4)))], rng, dim)
             for name in ("a", "b")}  # fmt: skip
    stores = []
    for name, rows in parts.items():
        import_features(BagFolder(folder / name, "uni"), folder / f"st-{name}", "float32", silent)
        stores.append(FeatureStore.open(folder / f"st-{name}"))
        held(stores[-1], rows)
    whole = parts["a"] + parts["b"]
    import_features(StoreRows([(one, np.arange(len(one))) for one in stores]), folder / "merged", None, silent)
    merged = FeatureStore.open(folder / "merged")
    held(merged, whole)
    some = np.flatnonzero(rng.random(len(whole)) < 0.5)
    if len(some):
        import_features(StoreRows([(merged, some)]), folder / "subset", None, silent)
        held(FeatureStore.open(folder / "subset"), [whole[row] for row in some])
    export_npy(merged, folder / "npy")
    import_features(ClipRetrievalFolder(folder / "npy/uni", "other"), folder / "back", None, silent)
    held(FeatureStore.open(folder / "back"), whole)
    assert FeatureStore.open(folder / "back").sample_table() == merged.sample_table()
    export_parquet(merged, folder / "parquet")
    table = pq.read_table(folder / "parquet/data")
    assert table.select(merged.samples.schema.names).equals(merged.sample_table())
    assert table["uni_image"].is_null().to_pylist() == [row["feature"] is None for row in whole]


def test_values_are_kept_unless_an_encoding_is_named(tmp_path: Path) -> None:
    for name, kind, encoding in (("half", "<f2", "float16"), ("single", "<f4", "float32")):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "a.h5", "w") as file:
            file["features"], file["coords"] = np.full((1, 3), 0.1, kind), np.zeros((1, 2), int)
        assert BagFolder(tmp_path / name, "uni").cards(None)[0].encoding == encoding
    with h5py.File(tmp_path / "half/b.h5", "w") as file:
        file["features"], file["coords"] = np.full((1, 3), 0.1), np.zeros((1, 2), int)
    with pytest.raises(UserError, match=r"holds float64, which no encoding .* keeps; round it: --encoding float32"):
        BagFolder(tmp_path / "half", "uni").cards(None)
    assert BagFolder(tmp_path / "half", "uni").cards("float32")[0].encoding == "float32"


def test_data_sets_beside_the_features_are_asked_for(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", 2)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["attention"] = np.ones(2)
    with pytest.raises(UserError, match=r"the data set attention \(first in a.h5\); nothing .* columns to accept"):
        BagFolder(tmp_path, "uni").cards(None)
    assert BagFolder(tmp_path, "uni", allow_loss=["columns"]).cards(None)[0].dim == 6


def test_files_that_are_no_bags(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(CorpusError, match=message) as caught:
            list(BagFolder(tmp_path, "uni").rows())
        assert "\n" not in str(caught.value)

    refused("no .h5 bag")
    write_bag(tmp_path / "a.h5", 5)
    write_bag(tmp_path / "b.h5", 5, dim=7)
    refused("7 wide, those of a.h5 6")
    (tmp_path / "b.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:900])
    refused("not a sound HDF5")
    write_bag(tmp_path / "b.h5", 5)
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        del file["coords"]
    refused("coords do not belong")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(tmp_path / "a.h5"), "features")
    refused("of its own")


def described(folder: Path, join: str, kind: str = "bags") -> Path:
    path = folder / "set.yaml"
    path.write_text(f"dataset: nodes\nsource: {{kind: {kind}, path: bags, join: {join}}}\n")
    return path


def test_a_described_set_of_bags_joins_diagnoses_and_folds(tmp_path: Path) -> None:
    (tmp_path / "bags").mkdir()
    for seed, slide in enumerate(("TCGA-AB-1234-01Z", "other")):
        write_bag(tmp_path / "bags" / f"{slide}.h5", 5 + seed, seed=seed)
    (tmp_path / "clam.csv").write_text("case_id,slide_id,label\nTCGA-AB-1234,TCGA-AB-1234-01Z,tumor\nc2,other,normal\n")
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,other,,TCGA-AB-1234-01Z\n")
    (tmp_path / "splits_1.csv").write_text(",train,val,test\n0,TCGA-AB-1234-01Z,,other\n")
    join = "{table: clam.csv, key: slide_id, match: slide, fold_files: splits_*.csv}"
    source = _source(described(tmp_path, join), "clips_output", "uni")
    import_features(source, tmp_path / "store", None, lambda done, every: None)
    table = FeatureStore.open(tmp_path / "store").sample_table()
    assert table["slide"].to_pylist() == ["TCGA-AB-1234-01Z"] * 5 + ["other"] * 6
    assert table["label"].to_pylist() == ["tumor"] * 5 + ["normal"] * 6
    assert table["fold"].to_pylist() == ["0"] * 5 + ["1"] * 6
    assert set(table["row_kind"].to_pylist()) == {"sample"}
    (tmp_path / "clam.csv").write_text("case_id,slide_id,label\nc1,TCGA-AB-1234-01Z.svs,tumor\n")
    strayed = _source(described(tmp_path, "{table: clam.csv, key: slide_id, match: slide}"), "clips_output", "uni")
    with pytest.raises(CorpusError, match=r"no line for any of 2 slides, matched by slide \(for example 'TCGA-AB"):
        list(strayed.rows())


@pytest.mark.parametrize(
    ("join", "kind", "message"),
    [
        ("{table: c.csv, key: a, match: stem}", "bags", "join matches 'stem', expected slide or patient"),
        ("null, splits: {a: b}", "bags", "of bags it takes kind, path and join"),
        ("null", "imagefolder", "describes no bags"),
    ],
)
def test_descriptions_that_are_no_bags(tmp_path: Path, join: str, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _source(described(tmp_path, join, kind), "clips_output", "uni")


def test_bags_are_not_extracted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nodes is bags of features; bring them in with: mmkd store import"):
        open_corpus(str(described(tmp_path, "null")))
