"""Evaluation sets as corpora: every layout that users hold, tables beside images, and prompts."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_corpus import png

from mmkd.extract.corpora import CorpusRow, corpus_digest, corpus_rows, open_corpus
from mmkd.store.errors import ConfigError, CorpusError
from mmkd.store.images import decode
from mmkd.store.sources import image_source

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


def described(folder: Path, source: dict[str, Any], **others: Any) -> Path:
    """The description of an evaluation set `tiny`."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"dataset": "tiny", "modality": "mri", "source": source} | others, sort_keys=False))
    return path


def rows_of(path: Path) -> list[CorpusRow]:
    """As extraction does it: the columns first."""
    corpus = open_corpus(str(path))
    labels = set(corpus.labels)
    rows = list(corpus_rows(corpus))
    assert all(set(row.labels) <= labels for row in rows)
    return rows


def pixels(root: str, row: CorpusRow) -> np.ndarray[Any, Any]:
    assert row.uri is not None
    return np.asarray(decode(image_source(root, row.uri, row.offset, row.length).read()))


def write_images(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))


# MedMNIST.


def write_npz(path: Path, **changes: np.ndarray[Any, Any] | None) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 6, 4), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n, dtype=np.uint8).reshape(-1, 1) % 2
    arrays |= changes
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_medmnist_rows_and_pixels(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz")
    corpus = open_corpus(str(path))
    rows = list(corpus_rows(corpus))
    assert [row.key for row in rows] == [f"train/{i}" for i in range(5)] + [
        "val/0",
        "val/1",
        "test/0",
        "test/1",
        "test/2",
    ]
    assert rows[6].labels == {"label": "1", "split": "val"}
    stored = np.load(path)
    # Backwards and forwards: the cursor begins anew and still finds the row.
    for i in (9, 7, 0, 4, 8):
        split, number = rows[i].key.split("/")
        assert np.array_equal(pixels(corpus.root, rows[i]), stored[f"{split}_images"][int(number)])


def test_a_row_that_was_passed_and_forgotten_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.store.npz_image._KEPT_BYTES", 0)
    monkeypatch.setattr("mmkd.store.npz_image._KEPT_ROWS", 2)
    path = write_npz(tmp_path / "a.npz")
    corpus = open_corpus(str(path))
    rows = list(corpus_rows(corpus))
    stored = np.load(path)["train_images"]
    for i in (4, 0, 3, 1):
        assert np.array_equal(pixels(corpus.root, rows[i]), stored[i])


def test_medmnist_colour_class_names_and_several_labels(tmp_path: Path) -> None:
    colour = np.random.default_rng(1).integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)
    several = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0]])
    path = write_npz(
        tmp_path / "b.npz", train_images=None, val_images=None, train_labels=None, val_labels=None,
        test_images=colour, test_labels=several,
    )  # fmt: skip
    corpus = open_corpus(str(path))
    rows = list(corpus_rows(corpus))
    assert corpus.labels == ("label_0", "label_1", "label_2", "split")
    assert [row.labels["label_1"] for row in rows] == ["1", "1", "0"]
    assert np.array_equal(pixels(corpus.root, rows[1]), colour[1])
    named = write_npz(tmp_path / "c.npz", classes=np.array(["hand", "chest"]))
    assert [row.labels["label"] for row in corpus_rows(open_corpus(str(named)))][:2] == ["hand", "chest"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": np.zeros((2, 1), int)}, "test has 3 images and 2 labels; expected a label for each"),
        ({"test_labels": None}, "test has 3 images and no labels"),
        ({"test_images": np.zeros((3, 4, 4, 4), np.uint8)}, "volumes are not read"),
        ({"test_images": np.zeros((3, 4, 4))}, "expected uint8"),
        ({"test_labels": np.zeros((3, 1))}, "expected integers"),
        ({"test_labels": np.zeros((3, 2), int)}, "labels of different widths"),
        ({f"{split}_images": None for split in ("train", "val", "test")}, "expected MedMNIST's arrays"),
        ({"classes": np.array([object()])}, "is not an .npz of plain arrays"),
    ],
)
def test_medmnist_archives_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(CorpusError, match=message):
        list(corpus_rows(open_corpus(str(path))))


def test_damaged_npz_costs_a_line_or_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(CorpusError, match=r"is not an \.npz of plain arrays"):
        list(corpus_rows(open_corpus(str(path))))
    sound = write_npz(tmp_path / "b.npz")
    rows = list(corpus_rows(open_corpus(str(sound))))
    data = bytearray(sound.read_bytes())
    middle = data.find(b"train_images") + 60  # inside the deflated pixels
    data[middle : middle + 20] = bytes(20)
    sound.write_bytes(bytes(data))
    from mmkd.store.images import ImageError

    with pytest.raises(ImageError, match="damaged npz"):
        pixels(str(tmp_path), rows[4])


# List files.


def test_list_files_of_the_released_layout(tmp_path: Path) -> None:
    write_images(tmp_path, "test/a b.png", "train/c.png")
    (tmp_path / "train.txt").write_text("c.png lung_n\n")
    (tmp_path / "test.txt").write_text("\ufeffa b.png lung_aca\n\nalone\n")
    rows = rows_of(described(tmp_path, {"kind": "listfile", "path": "."}))
    assert [(row.key, row.labels["label"], row.labels["split"]) for row in rows] == [
        ("test/a b.png", "lung_aca", "test"),
        ("test.txt:3", None, "test"),
        ("train/c.png", "lung_n", "train"),
    ]
    assert rows[1].fault == "row: expected a file name and a label"
    assert rows[0].modality == "mri"
    assert pixels(str(tmp_path), rows[0]).shape == (48, 40, 3)


def test_list_files_beside_their_images(tmp_path: Path) -> None:
    write_images(tmp_path, "img/a.png")
    (tmp_path / "all.txt").write_text("img/a.png 1\n")
    (row,) = rows_of(described(tmp_path, {"kind": "listfile", "path": "all.txt"}))
    assert (row.key, row.uri, row.labels["label"]) == ("img/a.png", "img/a.png", "1")


# Questions.


QUESTIONS = [
    {"qid": 1, "image_name": "a.png", "question": "Is it large?", "answer": "Yes", "answer_type": "CLOSED "},
    {"qid": 2, "image_name": "b.png", "question": "Where is it?", "answer": "left lung", "answer_type": "OPEN"},
    {"qid": 3, "image_name": "b.png", "question": "How many?", "answer": 2, "answer_type": "open"},
]


def test_questions_with_candidates(tmp_path: Path) -> None:
    (tmp_path / "trainset.json").write_text(json.dumps(QUESTIONS[:1]))
    (tmp_path / "testset.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "public.json").write_text('{"no": "list"}')
    splits = {"train": "trainset.json", "test": "testset.json"}
    source = {"kind": "vqa", "path": ".", "images": "img", "candidates": ["yes", "no"], "splits": splits}
    rows = rows_of(described(tmp_path, source))
    assert [row.key for row in rows] == [
        "test/testset/1", "test/testset/1#yes", "test/testset/1#no", "test/testset/2", "test/testset/3",
        "train/trainset/1",
    ]  # fmt: skip
    question, candidate, other = rows[0], rows[2], rows[4]
    assert (question.caption, question.uri) == ("Is it large?", "a.png")
    assert question.labels == {
        "image_name": "a.png", "answer": "Yes", "answer_type": "CLOSED", "split": "test",
        "row_kind": "sample", "text_of": None,
    }  # fmt: skip
    assert (candidate.caption, candidate.uri, candidate.labels["answer"]) == ("Is it large? no", None, "no")
    assert (candidate.labels["row_kind"], candidate.labels["text_of"]) == ("candidate", question.key)
    assert (other.labels["answer"], other.labels["answer_type"]) == ("2", "OPEN")


def test_an_open_question_has_no_candidates_whatever_its_answer(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps([QUESTIONS[0] | {"answer_type": "OPEN"}]))
    source = {"kind": "vqa", "path": "test.json", "candidates": ["yes", "no"]}
    assert [row.labels["row_kind"] for row in rows_of(described(tmp_path, source))] == ["sample"]


def test_slake_fields_and_languages(tmp_path: Path) -> None:
    records = [
        {"img_name": "x1/source.jpg", "question": "What?", "answer": "MRI", "q_lang": "en", "modality": "MRI", "qid": 0,
         "answer_type": "OPEN", "triple": ["a", "b"]},
        {"img_name": "x1/source.jpg", "question": "什么?", "answer": "肺", "q_lang": "zh", "modality": "MRI", "qid": 1,
         "answer_type": "OPEN", "triple": []},
    ]  # fmt: skip
    (tmp_path / "validate.json").write_text(json.dumps(records))
    (row,) = rows_of(described(tmp_path, {"kind": "vqa", "path": "validate.json"}))
    assert (row.uri, row.modality, row.labels["split"], row.labels["triple"]) == (
        "x1/source.jpg", "MRI", "val", '["a", "b"]',
    )  # fmt: skip
    assert len(rows_of(described(tmp_path, {"kind": "vqa", "path": "validate.json", "language": None}))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', r"t\.json holds dict, expected a list of questions; name the question files with `splits`"),
        ("[1]", "expected a list of questions"),
        ("[{", r"t\.json is not JSON"),
        ('[{"text": "What?"}]', "has no field 'question'; it has text"),
        ('[{"question": "What?", "status": 1}]', "has the name of a column of the sample table"),
    ],
)
def test_question_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(CorpusError, match=message):
        rows_of(described(tmp_path, {"kind": "vqa", "path": "t.json"}))


def test_candidates_that_yaml_reads_as_truth(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[]")
    path = tmp_path / "tiny.yaml"
    path.write_text("dataset: tiny\nsource: {kind: vqa, path: t.json, candidates: [yes, no]}\n")
    with pytest.raises(ConfigError, match="YAML reads True in candidates as true or false; put the words in quotes"):
        open_corpus(str(path))


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
