"""Evaluation sets as corpora: every layout that users hold, splits, roots, and descriptions that do not fit."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from set_scene import described, pixels, rows_of, write_images
from tiny_corpus import png

from mmkd.base.errors import ConfigError, CorpusError
from mmkd.extract.corpora import corpus_rows, open_corpus

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


# Layouts whose readers every corpus has, with splits by file name.


def test_clip_benchmark_splits_number_their_samples_alike(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "nshards.txt").write_text("1")
        with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
            for name, data in (("s0.png", png(0)), ("s0.cls", b"1\n")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = {"kind": "webdataset", "path": ".", "label_members": ["cls"], "splits": {"train": "train", "test": "test"}}
    rows = rows_of(described(tmp_path, source))
    assert [(row.key, row.labels["cls"], row.labels["split"]) for row in rows] == [
        ("test/s0", "1", "test"),
        ("train/s0", "1", "train"),
    ]


def test_hugging_face_parquet_splits_by_file_name(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["benign", "malignant"], "_type": "ClassLabel"}}}}
    for split, label in (("train", 0), ("test", 1)):
        table = pa.table({"image": [{"bytes": png(label), "path": "x.png"}], "label": [label]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    source = {"kind": "parquet", "path": ".", "splits": {"train": "data/train-*", "test": "data/test-*"}}
    corpus = open_corpus(str(described(tmp_path, source)))
    rows = list(corpus_rows(corpus))
    assert [(row.labels["label"], row.labels["split"]) for row in rows] == [("malignant", "test"), ("benign", "train")]
    assert pixels(corpus.root, rows[0]).shape == (48, 40, 3)


def test_retrieval_jsonl_says_its_splits_itself(tmp_path: Path) -> None:
    lines = [
        {"image": "a.png", "id": f"p{i}", "split": split, "caption": "x"} for i, split in enumerate(("train", "test"))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = rows_of(described(tmp_path, {"kind": "table", "path": "pairs.jsonl"}))
    assert [(row.key, row.labels["split"]) for row in rows] == [("p0", "train"), ("p1", "test")]


def test_tables_one_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("filepath,title,grade\na.png,one,3\n")
    (tmp_path / "test.csv").write_text("filepath,title,grade\nb.png,two,4\n")
    (tmp_path / "readme.csv").write_text("other\n")
    source = {"kind": "table", "path": ".", "splits": {"train": "train.csv", "test": "test.csv"}}
    rows = rows_of(described(tmp_path, source))
    assert [(row.key, row.labels["grade"], row.labels["split"]) for row in rows] == [
        ("test/b.png", "4", "test"),
        ("train/a.png", "3", "train"),
    ]
    (tmp_path / "train.csv").write_text("filepath,title\na.png,one\n")
    with pytest.raises(CorpusError, match=r"train\.csv has no column 'grade', which the first table has"):
        rows_of(described(tmp_path, source))


def test_image_folders_with_splits_of_other_names(tmp_path: Path) -> None:
    write_images(tmp_path, "A/cat/1.png", "B/cat/1.png", "C/dog/2.png")
    source = {"kind": "imagefolder", "path": ".", "splits": {"train": ["A", "C"], "test": "B"}}
    rows = rows_of(described(tmp_path, source))
    assert [(row.key, row.labels["split"], row.labels["label"]) for row in rows] == [
        ("train/A/cat/1.png", "train", "cat"),
        ("test/B/cat/1.png", "test", "cat"),
        ("train/C/dog/2.png", "train", "dog"),
    ]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": "trian"}, "train is trian, which fits none of A/cat/1.png, B/cat/1.png, tiny.yaml in"),
        ({"train": ["A", "B"], "test": "B"}, "B belongs to the splits train and test"),
    ],
)
def test_splits_that_fit_nothing_or_twice(tmp_path: Path, splits: dict[str, Any], message: str) -> None:
    write_images(tmp_path, "A/cat/1.png", "B/cat/1.png")
    with pytest.raises(CorpusError, match=message):
        rows_of(described(tmp_path, {"kind": "imagefolder", "path": ".", "splits": splits}))


@REAL
def test_real_sets(tmp_path: Path) -> None:
    def count(source: dict[str, Any], *columns: str) -> dict[tuple[Any, ...], int]:
        found: dict[tuple[Any, ...], int] = {}
        for row in rows_of(described(tmp_path, source)):
            assert row.fault is None
            which = tuple(row.labels[column] for column in columns)
            found[which] = found.get(which, 0) + 1
        return found

    splits = {"train": "trainset.json", "test": "testset.json"}
    vqa = {"kind": "vqa", "path": str(SHARED / "vqa_rad"), "images": str(SHARED / "vqa_rad/images"), "splits": splits}
    assert count(vqa, "split", "answer_type") == {
        ("test", "CLOSED"): 272, ("test", "OPEN"): 179, ("train", "CLOSED"): 1823, ("train", "OPEN"): 1241,
    }  # fmt: skip
    breast = {"kind": "medmnist", "path": str(SHARED / "breastmnist.npz")}
    assert count(breast, "split") == {("train",): 546, ("val",): 78, ("test",): 156}
    small = {"kind": "medmnist", "path": str(SHARED / "medical_mnist_small.npz")}
    assert set(count(small, "split", "label").values()) == {160, 60}
    brain = {"kind": "imagefolder", "path": str(SHARED / "brain_mri")}
    assert count(brain, "label") == {("no",): 98, ("yes",): 155}
    pairs = {
        "kind": "table",
        "path": str(next((SHARED / "pmc_pairs").glob("*.jsonl"))),
        "columns": {"caption": "caption"},
    }
    assert sum(count(pairs).values()) == 70


def test_roots_stand_in_a_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "data/tiny/yes/1.png")
    path = described(tmp_path, {"kind": "imagefolder", "path": "${data}/${dataset}"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMKD_ROOTS", raising=False)
    with pytest.raises(
        ConfigError,
        match=r"\$\{data\} has no value; write `data: FOLDER` into roots\.yaml .*\(it has dataset, suites\)",
    ):
        open_corpus(str(path))
    (tmp_path / "roots.yaml").write_text("data: data\n")
    assert len(rows_of(path)) == 1
    (tmp_path / "elsewhere.yaml").write_text("data: nowhere\n")
    monkeypatch.setenv("MMKD_ROOTS", "elsewhere.yaml")
    with pytest.raises(CorpusError, match="nowhere/tiny, which does not exist"):
        open_corpus(str(path))
    (tmp_path / "elsewhere.yaml").write_text("data: 3\n")
    with pytest.raises(ConfigError, match="data is 3, expected a folder or URL"):
        open_corpus(str(path))
    monkeypatch.setenv("MMKD_ROOTS", "gone.yaml")
    with pytest.raises(ConfigError, match=r"cannot read gone\.yaml"):
        open_corpus(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dataset": "tiny"}, "tiny has no `source` to read"),
        (
            {"dataset": "tiny", "source": {"kind": "imagefolders", "path": "."}},
            "kind is 'imagefolders', expected one of",
        ),
        (
            {"dataset": "tiny", "source": {"kind": "imagefolder", "path": ".", "split": {}}},
            "split: unknown key; did you mean 'splits'",
        ),
        (
            {"dataset": "tiny", "source": {"kind": "imagefolder", "path": ".", "splits": {"train": 3}}},
            "splits.train is 3",
        ),
        (
            {"dataset": "tiny", "source": {"kind": "imagefolder", "path": ".", "join": {"key": "a"}}},
            "join needs `table`",
        ),
        (
            {"dataset": "tiny", "source": {"kind": "table", "path": ".", "draw": {"test": 0.5}}},
            "shares of draw make 0.5",
        ),
        (
            {"dataset": "tiny", "source": {"kind": "table", "path": ".", "splits": {"test": "a"}, "draw": {"test": 1}}},
            "source has `splits` and `draw`; keep the published splits",
        ),
        ({"suite": "many", "datasets": []}, "is a suite; extract its data sets one by one"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        open_corpus(str(path))
