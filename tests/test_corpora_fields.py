"""Fields of a corpus.yaml that choose what becomes a caption, a modality, a label, or a split."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tiny_corpus import png

from mmkd.extract.corpora import CorpusRow, corpus_rows, open_corpus


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
