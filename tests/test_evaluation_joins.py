"""What stands beside a set's images: clinical columns, folds, splits drawn by patient, texts of tables, prompts."""

from __future__ import annotations

import datetime as dt
import os
import pickle
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from set_scene import described, rows_of, write_images

from mmkd.base.errors import ConfigError, CorpusError
from mmkd.extract.corpora import corpus_digest, corpus_rows, open_corpus

# Tables beside images.


def write_join(folder: Path, **join: Any) -> Path:
    write_images(folder, "img/s1.png", "img/s2.png", "img/s3.png")
    (folder / "pairs.csv").write_text("image,slide\nimg/s1.png,s1\nimg/s2.png,s2\nimg/s3.png,s3\n")
    source = {"kind": "table", "path": "pairs.csv", "join": {"key": "slide_id", "match": "slide"} | join}
    return described(folder, source)


def test_clinical_columns_are_joined_by_key(tmp_path: Path) -> None:
    # In another order than the images, and with a line that no image has.
    (tmp_path / "clinical.csv").write_text("slide_id,case_id,months\ns3,p2,7.5\ns9,p9,1\ns1,p1,3\n")
    rows = rows_of(write_join(tmp_path, table="clinical.csv"))
    assert [(row.labels["case_id"], row.labels["months"]) for row in rows] == [("p1", "3"), (None, None), ("p2", "7.5")]


def test_joined_on_file_names_and_from_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"slide_id": ["s1", "s2"], "grade": [2, None]}), tmp_path / "clinical.parquet")
    rows = rows_of(write_join(tmp_path, table="clinical.parquet", match="stem"))
    assert [row.labels["grade"] for row in rows] == ["2", None, None]


def test_keys_of_a_join_are_compared_as_all_text_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a", "b", "c", "d"], "case": [12.0, 13.5, None, 14.0]}), tmp_path / "p.parquet")
    (tmp_path / "c.csv").write_text("case,months,site\n12,3, \n 13.50 ,4,s\n12.0,3.0,\n")
    join = {"table": "c.csv", "key": "case", "match": "case", "columns": ["months", "site"]}
    rows = rows_of(described(tmp_path, {"kind": "parquet", "path": "p.parquet", "join": join}))
    assert [(row.labels["months"], row.labels["site"]) for row in rows] == [
        ("3", None), ("4", "s"), (None, None), (None, None),
    ]  # fmt: skip


def test_a_value_is_one_text_in_every_format(tmp_path: Path) -> None:
    columns = {
        "day": pa.array([dt.date(2020, 1, 2)]), "at": pa.array([dt.datetime(2020, 1, 2, 3, 4)]),
        "time": pa.array([dt.time(9, 30)]), "price": pa.array([Decimal("7.50")]),
        "single": pa.array([0.1], pa.float32()), "half": pa.array([np.float16(0.1)]),
        "gone": pa.array([float("nan")], pa.float32()), "truth": pa.array([True]), "list": pa.array([["a", "b"]]),
    }  # fmt: skip
    expected = {
        "day": "2020-01-02", "at": "2020-01-02 03:04:00", "time": "09:30:00", "price": "7.50",
        "single": "0.1", "half": "0.1", "gone": None, "truth": "true", "list": '["a", "b"]',
    }  # fmt: skip
    pq.write_table(pa.table({"image": pa.array(["a.png"])} | columns), tmp_path / "a.parquet")
    pq.write_table(pa.table({"name": pa.array(["b.png"])} | columns), tmp_path / "b.parquet")
    (tmp_path / "b.csv").write_text("image,other\nb.png,x\n")
    join = {"table": "b.parquet", "key": "name", "match": "name"}
    (read,) = rows_of(described(tmp_path, {"kind": "parquet", "path": "a.parquet"}))
    (joined,) = rows_of(described(tmp_path, {"kind": "table", "path": "b.csv", "join": join}))
    assert {name: read.labels[name] for name in columns} == expected
    assert {name: joined.labels[name] for name in columns} == expected


def test_a_patient_who_is_a_number_and_a_decimal_is_drawn_once(tmp_path: Path) -> None:
    lines = [f"{i}.png,{i // 2}{'.0' * (i % 2)}" for i in range(100)]
    (tmp_path / "a.csv").write_text("\n".join(["image,patient", *lines]))
    draw = {"train": 0.5, "test": 0.5, "by": "patient"}
    splits = [
        row.labels["split"] for row in rows_of(described(tmp_path, {"kind": "table", "path": "a.csv", "draw": draw}))
    ]
    assert splits[::2] == splits[1::2]
    assert set(splits) == {"train", "test"}


@pytest.mark.parametrize("mark", [",", "\t", ";"])
def test_a_table_says_by_its_header_what_divides_it(tmp_path: Path, mark: str) -> None:
    # HAM10000's table has no suffix, and Dataverse gives it with commas or tabs; HyperKvasir's .csv has semicolons.
    lines = [("slide_id", "grade", "note"), ("s1", "2", "a b"), ("s3", "4", "")]
    (tmp_path / "metadata").write_text("".join(mark.join(line) + "\n" for line in lines))
    rows = rows_of(write_join(tmp_path, table="metadata"))
    assert [(row.labels["grade"], row.labels["note"]) for row in rows] == [("2", "a b"), (None, None), ("4", None)]


def test_on_is_true_in_yaml(tmp_path: Path) -> None:
    path = write_join(tmp_path, table="c.csv")
    path.write_text(path.read_text().replace("match:", "on:"))
    with pytest.raises(ConfigError, match="YAML reads `on` as true; the field is called `match`"):
        open_corpus(str(path))


def test_splits_are_drawn_by_patient_and_stay(tmp_path: Path) -> None:
    lines = [f"{i}.png,p{i // 2}" for i in range(2000)]
    (tmp_path / "a.csv").write_text("\n".join(["image,patient", *lines]))
    draw = {"train": 0.7, "val": 0.1, "test": 0.2, "by": "patient"}
    rows = rows_of(described(tmp_path, {"kind": "table", "path": "a.csv", "draw": draw}))
    by_patient: dict[str | None, set[str | None]] = {}
    for row in rows:
        by_patient.setdefault(row.labels["patient"], set()).add(row.labels["split"])
    assert all(len(splits) == 1 for splits in by_patient.values())
    share = {name: sum(row.labels["split"] == name for row in rows) / 2000 for name in ("train", "val", "test")}
    assert share == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.05)
    # Fewer and other rows leave the others where they were.
    (tmp_path / "a.csv").write_text("\n".join(["image,patient", *lines[1000:1400], "x.png,"]))
    fewer = rows_of(described(tmp_path, {"kind": "table", "path": "a.csv", "draw": draw}))
    before = {row.key: row.labels["split"] for row in rows}
    assert all(before[row.key] == row.labels["split"] for row in fewer[:-1])


def test_image_paths_from_columns_and_tables_in_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "captions.csv").write_text(f"ID,Caption\n{split}1,a lung\n,nothing\n")
    columns = {"key": "ID", "caption": "Caption"}
    source = {
        "kind": "table",
        "path": ".",
        "only": ["*/captions.csv"],
        "columns": columns,
        "image_template": "{ID}.jpg",
    }
    rows = rows_of(described(tmp_path, source | {"columns": columns}))
    assert [(row.key, row.uri) for row in rows] == [
        ("test1", "test/test1.jpg"),
        ("test/captions.csv:2", None),
        ("train1", "train/train1.jpg"),
        ("train/captions.csv:2", None),
    ]


def test_published_folds_of_clam_and_patho_bench(tmp_path: Path) -> None:
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,s1,,s2\n1,s3,,\n")
    (tmp_path / "splits_1.csv").write_text(",train,val,test\n0,s2,,s1\n1,,,s3\n")
    rows = rows_of(write_join(tmp_path, fold_files="splits_*.csv"))
    assert [row.labels["fold"] for row in rows] == ["1", "0", "1"]
    (tmp_path / "k.tsv").write_text("slide_id\tlabel\tfold_0\tfold_1\ns1\ta\ttrain\ttest\ns2\tb\ttest\ttrain\n")
    rows = rows_of(write_join(tmp_path, table="k.tsv", fold_columns="fold_"))
    assert [(row.labels["label"], row.labels["fold"]) for row in rows] == [("a", "1"), ("b", "0"), (None, None)]


@pytest.mark.integration
def test_fold_files_have_one_digest_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "splits_0.csv").write_text("train,val,test\na,b,c\na,b,d\na,b,e\n")
    script = (
        "import sys; from mmkd.extract.corpora.evaluation_set import Join\n"
        "print(Join(key='x', fold_files=(sys.argv[1],)).digest)"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path / "splits_0.csv")]
    seeds = [os.environ | {"PYTHONHASHSEED": str(seed)} for seed in range(3)]
    assert len({subprocess.run(command, env=env, capture_output=True, check=True).stdout for env in seeds}) == 1


@pytest.mark.parametrize(
    ("table", "join", "message"),
    [
        ("slide_id,m\ns1,1\ns1,2\n", {}, "'s1' has m '1' on one line and '2' on another"),
        ("id,m\ns1,1\n", {}, "has no column 'slide_id'; it has id, m"),
        ("slide_id,m\n,1\n", {}, "a line has nothing in column 'slide_id'"),
        ("slide_id,status\ns1,dead\n", {}, "column 'status' has the name of a column of the sample table"),
        ("slide_id,slide\ns1,x\n", {}, "column 'slide' of .* is a label of .* already"),
        ("slide_id,m\ns1,1,2\n", {}, "line 2 has 3 cells, expected 2"),
        ("slide_id,m\ns1,1\n", {"match": "patient"}, "join matches 'patient', expected key, name, stem, slide"),
        ("slide_id,fold_0,fold_1\ns1,test,test\n", {"fold_columns": "fold_"}, "'s1' is 'test' in 2 of the columns"),
        ("slide_id,m\ns1,1\n", {"fold_columns": "fold_"}, "has no column that begins with 'fold_'"),
        ("test\ns1\n", {"table": None, "fold_files": ["c.csv", "c.csv"]}, "'s1' is tested here and in fold 0 too"),
        ("slide_id\ns1\n", {"table": None, "fold_files": "c.csv"}, "has no column 'test'; expected CLAM's columns"),
        ("", {"table": None, "fold_files": "splits_*.csv"}, "fold_files is 'splits_.*', which no file matches"),
    ],
)
def test_tables_that_cannot_be_joined(tmp_path: Path, table: str, join: dict[str, Any], message: str) -> None:
    (tmp_path / "c.csv").write_text(table)
    with pytest.raises(CorpusError, match=message):
        rows_of(write_join(tmp_path, **({"table": "c.csv"} | join)))


def test_clinical_tables_become_texts(tmp_path: Path) -> None:
    (tmp_path / "kirc.csv").write_text("case_id,age,sex,months,censorship\np1,61,male,12,0\np2,,female,3,1\n")
    template = "{age}-year-old {sex} patient"
    source = {"kind": "table", "path": "kirc.csv", "columns": {"key": "case_id"}, "caption_template": template}
    first, second = rows_of(described(tmp_path, source))
    assert (first.key, first.caption, first.uri) == ("p1", "61-year-old male patient", None)
    assert second.caption == "unknown-year-old female patient"
    assert second.labels["censorship"] == "1"
    with pytest.raises(CorpusError, match=r"has no column 'years' \(for the caption_template\); it has case_id"):
        rows_of(described(tmp_path, source | {"caption_template": "{years}"}))
    for template in ("{age.real}", "{age!r}", "{age:>9}", "{", "old"):
        with pytest.raises(ConfigError, match="template"):
            rows_of(described(tmp_path, source | {"caption_template": template}))


# Prompts, roots, and the whole.


PROMPTS = {"templates": ["an MRI of {}", "{}"], "classes": {"tumour": ["a tumour", "a mass"], "none": "no tumour"}}


def test_prompts_are_rows_of_their_own(tmp_path: Path) -> None:
    write_images(tmp_path, "img/yes/1.png", "img/no/2.png")
    (tmp_path / "prompts.yaml").write_text(
        yaml.safe_dump(PROMPTS | {"negatives": {"tumour": ["healthy"]}}, sort_keys=False)
    )
    path = described(tmp_path, {"kind": "imagefolder", "path": "img"}, prompts={"file": "prompts.yaml"})
    corpus = open_corpus(str(path))
    assert corpus.labels == ("label", "split", "row_kind", "text_of")
    prompts = [row for row in corpus_rows(corpus) if row.labels["row_kind"] != "sample"]
    assert [(row.key, row.caption) for row in prompts] == [
        ("prompt:tumour:0", "an MRI of a tumour"),
        ("prompt:tumour:1", "a tumour"),
        ("prompt:tumour:2", "an MRI of a mass"),
        ("prompt:tumour:3", "a mass"),
        ("prompt:none:0", "an MRI of no tumour"),
        ("prompt:none:1", "no tumour"),
        ("negative_prompt:tumour:0", "an MRI of healthy"),
        ("negative_prompt:tumour:1", "healthy"),
    ]
    assert {row.labels["text_of"] for row in prompts[:4]} == {"tumour"}
    before = corpus_digest(corpus, corpus.parts())
    assert corpus_digest(pickle.loads(pickle.dumps(corpus)), corpus.parts()) == before
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS, sort_keys=False))
    changed = open_corpus(str(path))
    assert corpus_digest(changed, changed.parts()) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: {yes: [a]}", "YAML reads a class name as True; put it in quotes"),
        ("classes: {a: []}", "class 'a' has no text"),
        ("classes: {a: [x, x]}", "class 'a' has the text 'x' twice"),
        ("classes: {a: [' ']}", "classes.a.0"),
        ("classes: {}", "classes"),
        ("{templates: [photo], classes: {a: [x]}}", "template 'photo' must have one {}, where the class goes"),
        ("{classes: {a: [x]}, negatives: {b: [y]}}", "negatives of 'b', which is not among the classes a"),
        ("{clases: {a: [x]}}", "unknown key; did you mean 'classes'"),
    ],
)
def test_prompt_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    write_images(tmp_path, "img/yes/1.png")
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_corpus(str(described(tmp_path, {"kind": "imagefolder", "path": "img"}, prompts={"file": "prompts.yaml"})))
