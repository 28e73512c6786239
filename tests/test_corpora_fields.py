"""Fields of a corpus.yaml that choose what becomes a caption, a modality, a label, or a split."""

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
from tiny_corpus import png

from mmkd.base.errors import CorpusError
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora import CorpusRow, corpus_rows, open_corpus
from mmkd.extract.index import list_corpus


def rows_of(folder: Path, **content: Any) -> tuple[tuple[str, ...], list[CorpusRow]]:
    """Label columns and rows of the corpus that these fields describe."""
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump(content))
    corpus = open_corpus(str(path))
    return tuple(corpus.labels), list(corpus_rows(corpus))


def test_only_the_columns_named_become_labels(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption,organ,site,age\na.png,one,liver,s1,3\n")
    labels, (row,) = rows_of(tmp_path, kind="table", path="t.csv", label_columns=["site"])
    assert (labels, row.labels) == (("site",), {"site": "s1"})
    table = pa.table({"image": [png(1)], "caption": ["one"], "organ": ["liver"], "site": ["s1"]})
    pq.write_table(table, tmp_path / "t.parquet")
    labels, (row,) = rows_of(tmp_path, kind="parquet", path="t.parquet", label_columns=["organ"])
    assert (labels, row.labels) == (("organ",), {"organ": "liver"})
    asked = {"qid": 1, "image_name": "a.png", "question": "Is it large?", "answer": "yes", "organ": "liver"}
    (tmp_path / "test.json").write_text(json.dumps([asked]))
    labels, (row,) = rows_of(tmp_path, kind="vqa", path="test.json", label_columns=["answer"])
    assert labels == ("answer", "split", "row_kind", "text_of")
    assert "organ" not in row.labels


def test_a_sidecars_fields_are_those_named(tmp_path: Path) -> None:
    told = {"caption": "usual", "modality": "ct", "report": "ours", "device": "mri", "organ": "liver"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("k.png", png(1)), ("k.json", json.dumps(told).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, (row,) = rows_of(tmp_path, kind="webdataset", path="a.tar")
    assert (row.caption, row.modality, row.labels) == ("usual", "ct", {})
    fields = {"caption_field": "report", "modality_field": "device", "label_fields": ["organ"]}
    labels, (row,) = rows_of(tmp_path, kind="webdataset", path="a.tar", **fields)
    assert (row.caption, row.modality, row.labels, labels) == ("ours", "mri", {"organ": "liver"}, ("organ",))


def test_top_folders_are_splits_when_it_is_said_so(tmp_path: Path) -> None:
    for folder in ("site-a/cat", "site-b/dog"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "x.png").write_bytes(png(1))
    _, rows = rows_of(tmp_path, kind="imagefolder", path="images")
    assert [(row.labels["label"], row.labels["split"]) for row in rows] == [("site-a", None), ("site-b", None)]
    _, rows = rows_of(tmp_path, kind="imagefolder", path="images", split_folders=True)
    assert [(row.labels["label"], row.labels["split"]) for row in rows] == [("cat", "site-a"), ("dog", "site-b")]
    for name in ("site-a", "site-b"):
        (tmp_path / "images" / name).rename(tmp_path / "images" / {"site-a": "train", "site-b": "test"}[name])
    _, rows = rows_of(tmp_path, kind="imagefolder", path="images", split_folders=False)
    assert [(row.labels["label"], row.labels["split"]) for row in rows] == [("test", None), ("train", None)]


def test_rows_that_are_texts_on_purpose_lack_nothing(tmp_path: Path) -> None:
    lines = "image,caption,row_kind,split\na.png,one,sample,test\n,two,prompt,prompt\n,three,sample,test\n"
    (tmp_path / "t.csv").write_text(lines)
    (tmp_path / "a.png").write_bytes(png(1))
    overview = list_corpus(open_corpus(str(tmp_path / "t.csv")))
    assert overview.reasons == {"pair: no image": (1, "line-3")}
    first, *_ = overview.lines()
    assert first == "corpus: 1 image, 2 captions, 1 pair, 1 text without an image on purpose, 1 row with one side"
    _, rows = rows_of(tmp_path, kind="table", path="t.csv", texts={"split": ["test"]})
    assert [(row.by_design, row.fault) for row in rows] == [(False, None), (False, "pair: no image"), (True, None)]
    with pytest.raises(CorpusError, match=r"has no column 'sort' \(for the texts\)"):
        rows_of(tmp_path, kind="table", path="t.csv", texts={"sort": ["prompt"]})


def test_a_flat_column_of_image_bytes_is_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image.bytes": [png(1)], "caption": ["one"]}), tmp_path / "t.parquet")
    _, (row,) = rows_of(tmp_path, kind="parquet", path="t.parquet")
    assert image_source(str(tmp_path), row.uri or "").read() == png(1)


def test_stores_of_earlier_versions_know_the_fields_that_are_not_set(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption,split\na.png,one,test\n")
    assert "texts" not in json.loads(open_corpus(str(tmp_path / "t.csv")).settings())
    (tmp_path / "c.yaml").write_text("kind: table\npath: t.csv\ntexts: {split: [prompt]}\n")
    assert json.loads(open_corpus(str(tmp_path / "c.yaml")).settings())["texts"] == {"split": ["prompt"]}
