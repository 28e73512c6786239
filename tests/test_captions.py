"""Several captions of an image: the first lies in its row, every further distinct one is a row for texts alone."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_corpus import FIELDS, described, write_jsonl
from in_process import load, run, tree_digest
from tiny_corpus import png
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import ConfigError, CorpusError
from mmkd.base.images.views import Views
from mmkd.extract.corpora import open_corpus
from mmkd.extract.derived import append_pictures
from mmkd.extract.index import append_corpus, check_same_corpus, create_indexed_store, list_corpus, restore_parts
from mmkd.extract.limited_corpus import LimitedCorpus
from mmkd.extract.teachers import Teacher
from mmkd.store import FeatureStore
from mmkd.store.ledger import read_ledger
from mmkd.store.record import Store
from mmkd.store.samples import sample_dataset

ROWS = [
    {"key": "a", "image": "0.png", "caption": ["one", "two", "", "three"], "made": "x", "kind": "reference"},
    {"key": "b", "image": "1.png", "caption": ["two", "two", "four"], "made": ["y", "x"], "kind": "reference"},
    {"key": "c", "image": "2.png", "caption": [], "made": None, "kind": None},
    {"key": "d", "image": "3.png", "caption": ["five"], "made": "five", "kind": None},
    {"key": "b", "image": "1.png", "caption": ["six"], "made": "z", "kind": "report"},
    {"key": "a", "image": "3.png", "caption": ["seven"], "made": "no", "kind": None},
    {"key": "d", "image": "3.png", "caption": ["five"], "made": "x", "kind": None},
]
EXPECTED = [
    ("a#caption-1", "two", "reference", [0]),
    ("a#caption-2", "three", "reference", [0]),
    ("a#caption-3", "x", "synthetic", [0, 1, 3]),
    ("b#caption-1", "four", "reference", [1]),
    ("b#caption-2", "y", "synthetic", [1]),
    ("b#caption-3", "six", "report", [1]),
    ("b#caption-4", "z", "synthetic", [1]),
]


def write_parquet(folder: Path) -> Path:
    """The same as Parquet."""
    folder.mkdir()
    rows = [{**row, "made": [row["made"]] if isinstance(row["made"], str) else row["made"]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return described(folder, {"kind": "parquet", "path": "pairs.parquet", **FIELDS})


def further(root: Path) -> list[tuple[object, ...]]:
    """Rows of the captions' corpus."""
    store = Store.open(root)
    table = sample_dataset(store).to_table().to_pylist()
    span = next(span for span in store.record.spans() if span.corpus.kind == "captions")
    names = ("key", "caption", "caption_kind", "image_rows")
    return [tuple(row[name] for name in names) for row in table[span.rows.start : span.rows.stop]]


@pytest.mark.parametrize("write", [lambda folder: write_jsonl(folder, ROWS), write_parquet])
def test_each_further_caption_is_one_row(tmp_path: Path, write: object) -> None:
    corpus = open_corpus(str(write(tmp_path / "corpus")))  # type: ignore[operator]
    assert corpus.labels == ()
    store = create_indexed_store(corpus, tmp_path / "s")
    assert [(span.corpus.kind, span.corpus.towers, span.rows) for span in store.record.spans()] == [
        (corpus.kind, ("image", "text"), range(5)),
        ("captions", ("text",), range(256, 263)),
    ]
    assert further(tmp_path / "s") == EXPECTED
    assert store.record.appended[0].location == f"captions of {corpus.location}"
    images = sample_dataset(store).to_table().to_pylist()[:5]
    assert [(row["key"], row["caption"], row["reason"], row["image_rows"]) for row in images] == [
        ("a", "one", None, None),
        ("b", "two", None, None),
        ("c", "", "caption: empty", None),
        ("d", "five", None, None),
        ("a", "seven", "key: duplicate of row 0", None),
    ]
    lines = list(list_corpus(corpus).lines())
    assert lines[0] == "corpus: 5 images, 4 captions, 4 pairs, 7 further captions, 1 row with one side"
    assert any("1 x caption: empty, such as c (write a caption" in line for line in lines)
    assert check_same_corpus(corpus, store).rows == range(5)


def test_a_caption_of_a_thousand_images_is_one_row(tmp_path: Path) -> None:
    rows = [{"key": f"k{i}", "image": "0.png", "caption": [f"own {i}", "a picture"]} for i in range(1000)]
    corpus = open_corpus(str(write_jsonl(tmp_path / "corpus", rows, further={}, kind_column=None)))
    create_indexed_store(corpus, tmp_path / "s")
    assert further(tmp_path / "s") == [("k0#caption-1", "a picture", None, list(range(1000)))]


def test_lines_of_one_image_are_its_captions(tmp_path: Path) -> None:
    """Flickr30k's and COCO's tables: no key, five lines of each image, not all of them neighbors."""
    lines = [f"{i % 4}.png,caption {i} of {i % 4}" for i in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    corpus = open_corpus(str(described(tmp_path, {"kind": "table", "path": "t.csv", "captions": "further"})))
    store = create_indexed_store(corpus, tmp_path / "s")
    assert [span.rows for span in store.record.spans()] == [range(4), range(256, 272)]
    assert further(tmp_path / "s") == [
        (f"{i % 4}.png#caption-{i // 4}", f"caption {i} of {i % 4}", None, [i % 4]) for i in range(4, 20)
    ]


def test_a_further_line_without_a_caption_brings_those_of_its_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption,made\n0.png,own,\n0.png,,two\n0.png,,\n")
    content = {"kind": "table", "path": "t.csv", "captions": "further", "further": {"made": "synthetic"}}
    create_indexed_store(open_corpus(str(described(tmp_path, content))), tmp_path / "s")
    assert further(tmp_path / "s") == [("0.png#caption-1", "two", "synthetic", [0])]
    rows = sample_dataset(Store.open(tmp_path / "s")).to_table().to_pylist()
    assert [row["reason"] for row in rows[:2]] == [None, "key: duplicate of row 0"]


@pytest.mark.parametrize("keyed", [False, True])
def test_an_image_whose_first_line_is_refused_is_that_of_the_next(tmp_path: Path, keyed: bool) -> None:
    head, key = ("key,image,caption", "k,") if keyed else ("image,caption", "")
    lines = [f"{key}0.png,{caption}" for caption in ("", "one", "two", "one")]
    (tmp_path / "t.csv").write_text("\n".join([head, *lines, f"{key and 'k#1,'}1.png,two"]))
    corpus = open_corpus(str(described(tmp_path, {"kind": "table", "path": "t.csv", "captions": "further"})))
    create_indexed_store(LimitedCorpus(corpus, None, "pairs"), tmp_path / "pairs")
    rows = sample_dataset(Store.open(tmp_path / "pairs")).to_table().to_pylist()
    first, second, third = ("k", "k#line-2", "k#1") if keyed else ("0.png", "0.png#line-2", "1.png")
    assert [(row["key"], row["caption"], row["reason"]) for row in rows[:3]] == [
        (first, "", "row: no caption, left out by --require pairs"),
        (second, "one", None),
        (third, "two", None),
    ]
    assert further(tmp_path / "pairs") == [(f"{second}#caption-1", "two", None, [1])]
    # Without the demand the image is used, and has no caption of its own.
    create_indexed_store(corpus, tmp_path / "all")
    rows = sample_dataset(Store.open(tmp_path / "all")).to_table().to_pylist()
    assert [(row["key"], row["caption"], row["reason"]) for row in rows[:2]] == [
        (first, "", "caption: empty"), (third, "two", None),
    ]  # fmt: skip
    assert further(tmp_path / "all") == [
        (f"{first}#caption-{i}", text, None, [0]) for i, text in ((1, "one"), (2, "two"))
    ]


def test_lists_of_a_tar_and_lines_of_its_texts(tmp_path: Path) -> None:
    def member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        member(tar, "a.png", png(0))
        member(tar, "a.json", json.dumps({"caption": ["one", "two"], "llava": ["three"]}).encode())
        member(tar, "b.png", png(1))
        member(tar, "b.txt", b"four\nfive\n\nsix\n")
        member(tar, "b.json", json.dumps({"llava": "two"}).encode())
    fields = {"captions": "further", "caption_members": ["txt", "json"], "further": {"llava": "synthetic"}}
    corpus = open_corpus(str(described(tmp_path, {"kind": "webdataset", "path": "00.tar", **fields})))
    create_indexed_store(corpus, tmp_path / "s")
    assert further(tmp_path / "s") == [
        ("a#caption-1", "two", None, [0]),
        ("a#caption-2", "three", "synthetic", [0]),
        ("b#caption-1", "five", None, [1]),
        ("b#caption-2", "six", None, [1]),
        ("b#caption-3", "two", "synthetic", [1]),
    ]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    for fields in ({"further": {"gone": "synthetic"}}, {"kind_column": "gone"}):
        corpus = open_corpus(str(write_jsonl(tmp_path / "corpus", ROWS, **fields)))
        with pytest.raises(CorpusError, match=r"has no column 'gone' \(for the further captions\); it has key, image"):
            list_corpus(corpus)


def test_a_further_table_that_lacks_the_column(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    for name, made in (("a", ",made"), ("b", "")):
        (tmp_path / f"tables/{name}.csv").write_text(f"key,image,caption{made}\n{name},0.png,one{made and ',two'}\n")
    content = {"kind": "table", "path": "tables", "images": ".", "further": {"made": "synthetic"}}
    with pytest.raises(CorpusError, match=r"b.csv has no column 'made', which the first table has"):
        list_corpus(open_corpus(str(described(tmp_path, content))))


def test_kinds_without_further_captions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind_column is 'kind', which is of `captions: further`; write that, or"):
        open_corpus(str(write_jsonl(tmp_path / "corpus", ROWS, captions="first")))


def test_what_is_no_text_is_no_caption(tmp_path: Path) -> None:
    made = [{"en": "two"}, "three", ["four"], 5, None]
    rows = [{"image": "0.png", "caption": "one", "made": made}]
    corpus = open_corpus(str(write_jsonl(tmp_path / "corpus", rows, kind_column=None)))
    create_indexed_store(corpus, tmp_path / "s")
    assert [row[1] for row in further(tmp_path / "s")] == ["three", "5"]
    said = [line for line in list_corpus(corpus).lines() if "ignored" in line]
    assert said == ["  ignored: 2 x caption: no text in a further column, such as line-1"]


def test_what_is_too_long_fails_alone(tmp_path: Path) -> None:
    rows = [{"key": "a", "image": "0.png", "caption": ["one", "x" * (1 << 20) + "y", "two"]}]
    corpus = open_corpus(str(write_jsonl(tmp_path / "corpus", rows, further={}, kind_column=None)))
    store = create_indexed_store(corpus, tmp_path / "s")
    table = sample_dataset(store).to_table().slice(256).to_pylist()
    assert [(row["caption"], row["reason"]) for row in table] == [
        ("", "caption: longer than 1,048,576 characters"),
        ("two", None),
    ]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """One with two towers."""
    return load({"one": write_tiny_teacher(tmp_path_factory.mktemp("t") / "one", seed=1)}, "one")


def test_texts_are_encoded_once_and_images_too(tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    table = write_jsonl(tmp_path / "corpus", ROWS)
    store = run(table, tmp_path / "s", teachers)
    assert store.verify(deep=True).sound
    assert store.valid("one")[:5].tolist() == [3, 3, 1, 3, 0]
    assert store.valid("one")[256:263].tolist() == [2] * 7
    entry = read_ledger(store.root)[1, "one"]
    assert (entry.text_rows, entry.image_rows) == (7, None)
    # The text of row 256 is the first caption of row 1.
    assert store.text("one")[256].tobytes() == store.text("one")[1].tobytes()
    append_pictures(Store.open(tmp_path / "s"), Views(count=2), lambda line: None)
    assert [span.corpus.kind for span in Store.open(tmp_path / "s").record.spans()] == ["table", "captions", "views"]


def test_captions_appended_restored_and_made_again_are_the_same(tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "corpus", ROWS)
    corpus = open_corpus(str(table))
    first = open_corpus(str(write_jsonl(tmp_path / "other", [{**ROWS[0], "key": "z"}])))
    create_indexed_store(first, tmp_path / "s")
    for _ in range(2):
        assert append_corpus(corpus, tmp_path / "s").rows == range(512, 517)
    store = FeatureStore.open(tmp_path / "s")
    assert [span.corpus.kind for span in store.record.spans()] == ["table", "captions"] * 2
    rows = sample_dataset(store).to_table().slice(768).to_pylist()
    assert [row["image_rows"] for row in rows] == [[512 + row for row in images] for *_, images in EXPECTED]
    assert store.verify().sound
    before = tree_digest(tmp_path / "s")
    for shard in (1, 2, 3):
        (tmp_path / f"s/samples/{shard:05d}.parquet").unlink()
    assert [restore_parts(one, store) for one in (first, corpus)] == [1, 2]
    assert tree_digest(tmp_path / "s") == before
