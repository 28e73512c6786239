"""Corpora and the index: every input gets one row, bad ones too, and a user's mistake one line."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from tiny_corpus import png, write_table_corpus, write_tar_corpus

from mmkd.base.errors import ConfigError, CorpusError
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.extract.corpora.row import replace_surrogates
from mmkd.extract.index import check_same_corpus, create_indexed_store
from mmkd.store import FeatureStore


def test_table_rows_in_order_with_labels(tmp_path: Path) -> None:
    corpus = open_corpus(str(write_table_corpus(tmp_path / "c", 3)))
    rows = list(corpus_rows(corpus))
    assert [row.key for row in rows] == ["k0", "k1", "k2"]
    assert rows[1].uri == "images/1.png"
    assert rows[1].caption == "finding 1 seen in plane 1"
    assert rows[1].modality == "CT"
    assert rows[2].labels == {"site": "s2"}
    assert corpus.labels == ("site",)


def test_jsonl_and_usual_column_names(tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    table.write_text('{"filepath": "a.png", "title": "one", "n": 3}\n\n{"filepath": "b.png", "title": null}\n')
    first, second = corpus_rows(open_corpus(str(table)))
    assert (first.key, first.uri, first.caption, first.labels) == ("a.png", "a.png", "one", {"n": "3"})
    assert (second.caption, second.labels) == ("", {"n": None})


def test_tar_samples_know_where_their_bytes_are(tmp_path: Path) -> None:
    corpus = open_corpus(str(write_tar_corpus(tmp_path / "tars", 5, per_tar=2)))
    rows = list(corpus_rows(corpus))
    assert [row.key for row in rows] == ["k0", "k1", "k2", "k3", "k4"]
    assert [row.uri for row in rows] == ["00000.tar", "00000.tar", "00001.tar", "00001.tar", "00002.tar"]
    for number, row in enumerate(rows):
        assert row.uri is not None
        assert row.offset is not None
        assert row.length is not None
        data = (Path(corpus.root) / row.uri).read_bytes()[row.offset : row.offset + row.length]
        assert data == png(number)
        assert row.caption == f"finding {number}"


def test_tar_keys_end_at_the_last_known_suffix_and_json_gives_captions(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("dir/p.1.seg.png", b"x"),
            ("dir/q.jpg", b"x"),
            ("dir/q.json", b'{"caption": "lung", "modality": "CT", "organ": 7}'),
            ("readme", b"no suffix"),
            ("dir/r.txt", b"text only"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    description = tmp_path / "corpus.yaml"
    description.write_text("kind: webdataset\npath: a.tar\nlabel_fields: [organ]\n")
    rows = list(corpus_rows(open_corpus(str(description))))
    assert [(row.key, row.caption, row.modality) for row in rows] == [
        ("dir/p.1.seg", None, None),
        ("dir/q", "lung", "CT"),
        ("dir/r", "text only", None),
    ]
    assert rows[1].labels == {"organ": "7"}
    assert rows[2].uri is None


def test_a_cut_tar_keeps_what_comes_before_the_cut(tmp_path: Path) -> None:
    folder = write_tar_corpus(tmp_path / "tars", 6, per_tar=6)
    tar = folder / "00000.tar"
    rows = list(corpus_rows(open_corpus(str(tar))))
    assert rows[3].offset is not None
    tar.write_bytes(tar.read_bytes()[: rows[3].offset + 10])
    *kept, last = corpus_rows(open_corpus(str(tar)))
    assert [row.key for row in kept] == ["k0", "k1", "k2", "k3"]
    assert last.fault == "archive: ends early or is damaged, what follows is lost"


def test_index_marks_duplicates_and_empty_rows_and_keeps_all(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("key,image,caption\na,1.png,one\nb,2.png,two\na,3.png,three\nc,,\n")
    create_indexed_store(open_corpus(str(table)), tmp_path / "s")
    rows = FeatureStore.open(tmp_path / "s").sample_table(columns=["row", "key", "status", "reason"]).to_pylist()
    assert rows == [
        {"row": 0, "key": "a", "status": "pending", "reason": None},
        {"row": 1, "key": "b", "status": "pending", "reason": None},
        {"row": 2, "key": "a", "status": "failed", "reason": "key: duplicate of row 0"},
        {"row": 3, "key": "c", "status": "failed", "reason": "key: neither image nor caption"},
    ]


def test_a_caption_that_is_not_utf8_costs_its_own_row(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_bytes(b"image,caption\na.png,na\xefve\nb.png,caf\xc3\xa9\n")
    first, second = corpus_rows(open_corpus(str(table)))
    assert replace_surrogates(first.caption or "") == "na\ufffdve"
    assert second.caption == "café"


def test_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    table = write_table_corpus(tmp_path / "c", 3)
    store = create_indexed_store(open_corpus(str(table)), tmp_path / "s")
    check_same_corpus(open_corpus(str(table)), store)
    table.write_text(table.read_text().replace("finding 1", "finding 9"))
    with pytest.raises(CorpusError, match="differs"):
        check_same_corpus(open_corpus(str(table)), store)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "nowhere.csv", r"nowhere\.csv does not exist"),
        (lambda f: _write(f / "a.csv", "image,caption\n"), "has no rows"),
        (lambda f: _write(f / "a.csv", "foo,bar\n1,2\n"), "no column for the image or the caption; it has foo, bar"),
        (lambda f: _write(f / "a.csv", "image,caption,row\na,b,1\n"), "'row' has the name of a column"),
        (lambda f: _write(f / "a.jsonl", "{not json\n"), "line 1 is not JSON"),
        (lambda f: _write(f / "a.jsonl", "[1]\n"), "line 1 holds list"),
        (lambda f: _write(f / "a.tar", "no tar at all"), "not an uncompressed tar"),
        (lambda f: _write(f / "a.docx", "x"), r"\.docx is not"),
        (lambda f: f, "neither tars nor tables"),
    ],
)
def test_a_corpus_that_cannot_be_one(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(CorpusError, match=message) as caught:
        list(corpus_rows(open_corpus(str(make(tmp_path)))))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_an_empty_folder_of_tars_or_table_makes_no_store(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(CorpusError, match="is empty"):
        create_indexed_store(open_corpus(str(tmp_path / "empty.tar")), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("kind: table\npath: a.csv\ncolums: {}\n", ConfigError, r"colums.*did you mean 'columns'"),
        ("kind: zip\npath: a.csv\n", ConfigError, "'table'"),
        ("kind: table\npath: a.csv\ncolumns: {image: img}\n", CorpusError, "no column 'img'"),
        ("kind: table\npath: b.csv\n", CorpusError, "does not exist"),
        ("a: [", ConfigError, "not YAML"),
        ("- 1\n", ConfigError, "holds list"),
    ],
)
def test_a_description_with_a_mistake(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    _write(tmp_path / "a.csv", "image,caption\nx.png,y\n")
    description = _write(tmp_path / "corpus.yaml", text)
    with pytest.raises(error, match=message) as caught:
        list(corpus_rows(open_corpus(str(description))))
    assert "\n" not in str(caught.value)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
