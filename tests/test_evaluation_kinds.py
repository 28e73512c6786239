"""Kinds of released sets as corpora: MedMNIST's archives, list files, questions in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from set_scene import described, pixels, rows_of, write_images

from mmkd.base.errors import ConfigError, CorpusError
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.extract.index import list_corpus

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
    monkeypatch.setattr("mmkd.base.images.cells._BYTES_KEPT", 0)
    monkeypatch.setattr("mmkd.base.images.cells._ROWS_KEPT", 2)
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


def test_arrays_that_nothing_reads_are_counted(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_npz(tmp_path / "d" / "a.npz", test_images=None, masks=np.zeros(3))
    overview = list_corpus(open_corpus(str(tmp_path / "d")))
    reason = "array: neither the images nor the labels of a split"
    assert overview.ignored == {reason: (2, "test_labels.npy")}


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
    from mmkd.base.images.source import ImageError

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
