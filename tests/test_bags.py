"""Bags of CLAM and TRIDENT into a store: equal values, labels by slide, and files that are no bags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from mmkd.cli.store import store as store_commands
from mmkd.cli.store.convert import _source
from mmkd.evaluate import load_suite, result_table, run_suite
from mmkd.store import FeatureStore
from mmkd.store.convert.bags import BagFolder
from mmkd.store.convert.importing import import_features
from mmkd.store.errors import CorpusError

h5py = pytest.importorskip("h5py", reason="mmkd[wsi] is not installed")


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


def test_a_patch_that_is_not_finite_is_missing(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", 5)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["features"][2, 0] = np.nan
    import_features(BagFolder(tmp_path, "uni"), tmp_path / "s", "float32", lambda *_: None)
    rows = FeatureStore.open(tmp_path / "s").sample_table().to_pylist()
    assert [row["reason"] for row in rows] == [None, None, "features: not finite", None, None]
    assert FeatureStore.open(tmp_path / "s").valid("uni").tolist() == [1, 1, 0, 1, 1]


def test_clams_table_and_splits_make_imported_bags_ready_for_diagnosis(tmp_path: Path) -> None:
    """From h5 files, a CSV and fold files to a score; an empty bag is missing."""
    bags = tmp_path / "bags"
    bags.mkdir()
    rng = np.random.default_rng(0)
    slides = [f"s{i}" for i in range(24)]
    for i, slide in enumerate(slides):
        values = write_bag(bags / f"{slide}.h5", 0 if i == 3 else 4, seed=i)
        if len(values):
            with h5py.File(bags / f"{slide}.h5", "r+") as file:
                file["features"][:, 0] += 4 * (i // 2 % 2)  # what tells a tumour
    table = "\n".join(f"p{i // 2},{slide},{('normal', 'tumour')[i // 2 % 2]}" for i, slide in enumerate(slides))
    (tmp_path / "dataset.csv").write_text(f"case_id,slide_id,label\n{table}\nelsewhere,s99,tumour\n")
    patients = rng.permutation(12)
    for fold in range(3):
        tested = [slide for i, slide in enumerate(slides) if i // 2 in patients[fold::3]]
        (tmp_path / f"splits_{fold}.csv").write_text("train,val,test\n" + "".join(f",,{slide}\n" for slide in tested))
    (tmp_path / "join.yaml").write_text("table: dataset.csv\nkey: slide_id\nfold_files: splits_*.csv\n")
    typed = ["import", str(bags), str(tmp_path / "s"), "--name", "uni", "--labels"]
    done = CliRunner().invoke(store_commands, [*typed, str(tmp_path / "join.yaml")])
    assert (done.exit_code, done.output) == (0, f"93 rows in {tmp_path / 's'}; 1 shards written, 1 rows failed\n")
    rows = {row["key"]: row for row in FeatureStore.open(tmp_path / "s").sample_table().to_pylist()}
    assert (rows["s3"]["reason"], rows["s3"]["case_id"], rows["s3"]["x"]) == (
        "features: bag without patches",
        "p1",
        None,
    )
    assert rows["s2#0,1024"]["label"] == "tumour"
    assert {row["fold"] for row in rows.values()} == {"0", "1", "2"}
    spec = {
        "dataset": "slides", "label": "label", "group": "case_id", "bag": "slide", "fold": "fold",
        "tasks": ["diagnosis"], "rows": {"test": {}}, "settings": {"diagnosis": {"heads": ["mean_pool"], "seeds": 1}},
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"suite": "clam", "store": "s", "datasets": [spec]}))
    report = run_suite(load_suite(tmp_path / "suite.yaml"), tmp_path / "out")
    assert report.count("ran") == 1
    cell = result_table(tmp_path / "out", "diagnosis", by="dataset").cell("uni", "slides")
    assert (cell.n, cell.missing) == (23, 1)
    assert cell.value > 0.9


def test_tables_of_slides_that_do_not_fit(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", 5)
    table = tmp_path / "t.csv"

    def typed(content: str) -> str:
        table.write_text(content)
        done = CliRunner().invoke(
            store_commands, ["import", str(tmp_path), str(tmp_path / "s"), "--name", "uni", "--labels", str(table)]
        )
        assert done.exit_code == 1
        return str(done.exception)

    assert typed("name,label\na,x\n") == f"{table} has no column slide_id or slide; it has name, label"
    assert typed("slide,x\na,1\n") == "column 'x' of the table is what a patch's own label is called; rename it"
    assert "'a' has label '1' on one line and '2' on another" in typed("slide,label\na,1\na,2\n")
    (tmp_path / "meta.jsonl").write_text("")
    (tmp_path / "a.h5").unlink()
    assert "--labels is for a folder of bags" in typed("slide,label\na,1\n")


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
