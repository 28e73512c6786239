"""Parquet, ImageFolder, the original's meta.jsonl, CSV's many ways, and several captions of one image."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import png

from mmkd.base.errors import ConfigError, CorpusError
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora import Corpus, CorpusRow, corpus_rows, open_corpus

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def rows_of(location: Path | str) -> tuple[Corpus, list[CorpusRow]]:
    """The corpus and all its rows."""
    corpus = open_corpus(str(location))
    return corpus, list(corpus_rows(corpus))


def image_of(corpus: Corpus, row: CorpusRow) -> bytes:
    """The encoded bytes that a worker would read."""
    assert row.uri is not None
    return image_source(corpus.root, row.uri, row.offset, row.length).read()


def described(folder: Path, text: str) -> Path:
    """A corpus.yaml."""
    path = folder / "corpus.yaml"
    path.write_text(text)
    return path


def hugging_face(path: Path, rows: int) -> None:
    """As `datasets` writes images: struct{bytes, path}, class numbers whose names stand in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": png(i), "path": f"{i}.png"} for i in range(rows)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["benign", "malignant"], "_type": "ClassLabel"}}
    schema = pa.schema(
        [
            pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            pa.field("label", pa.int64()),
            pa.field("score", pa.float64()),
            pa.field("checked", pa.bool_()),
            pa.field("text", pa.string()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = {
        "image": image,
        "label": [i % 2 for i in range(rows)],
        "score": [None if i == 1 else i / 10 for i in range(rows)],
        "checked": [i > 1 for i in range(rows)],
        "text": [f"finding {i}" for i in range(rows)],
    }
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=7)


def test_hugging_face_parquet(tmp_path: Path) -> None:
    for shard in range(2):
        hugging_face(tmp_path / "data" / f"train-0000{shard}.parquet", 20)
    corpus, rows = rows_of(tmp_path)
    assert corpus.kind == "parquet"
    assert corpus.labels == ("label", "score", "checked")
    assert [row.key for row in rows[19:21]] == ["data/train-00000.parquet:19", "data/train-00001.parquet:0"]
    assert rows[1].labels == {"label": "malignant", "score": None, "checked": "false"}
    assert rows[22].labels == {"label": "benign", "score": "0.2", "checked": "true"}
    assert rows[22].caption == "finding 2"
    # Forwards, backwards and across files: every cell is its own.
    for number in (*range(40), 3, 39, 0, 21):
        assert image_of(corpus, rows[number]) == png(number % 20)


def test_parquet_with_bytes_beside_paths_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    image = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "a.png"}, None, {"bytes": b"", "path": None}]
    table = {"image": image, "id": ["w", "x", "y", "z"], "text": [["one", "two"], ["three"], None, []]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    corpus, rows = rows_of(tmp_path / "t.parquet")
    assert [row.key for row in rows] == ["w", "x", "y", "z"]
    assert [row.caption for row in rows] == ["one", "three", "", ""]
    assert image_of(corpus, rows[0]) == png(1)
    assert rows[1].uri == "a.png"
    assert image_of(corpus, rows[1]) == png(7)
    assert rows[2].uri is None
    with pytest.raises(ImageError, match="empty file"):
        image_of(corpus, rows[3])


def test_parquet_of_binary_column_and_of_paths(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [png(0), png(1)], "caption": ["a", "b"]}), tmp_path / "bytes.parquet")
    corpus, rows = rows_of(tmp_path / "bytes.parquet")
    assert image_of(corpus, rows[1]) == png(1)
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.png").write_bytes(png(5))
    pq.write_table(pa.table({"image_path": ["0.png"], "caption": ["a"], "n": [1]}), tmp_path / "paths.parquet")
    corpus, rows = rows_of(described(tmp_path, "kind: parquet\npath: paths.parquet\nimages: img\n"))
    assert (rows[0].key, rows[0].labels) == ("0.png", {"n": "1"})
    assert image_of(corpus, rows[0]) == png(5)


def test_a_damaged_parquet_file_costs_itself(tmp_path: Path) -> None:
    for name in "abc":
        hugging_face(tmp_path / f"{name}.parquet", 3)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:500])
    _, rows = rows_of(tmp_path)
    assert [row.fault for row in rows] == [None] * 3 + [rows[3].fault] + [None] * 3
    assert rows[3].fault == "archive: not Parquet, or damaged; what follows is lost"
    assert rows[3].key == "b.parquet"


def test_parquet_files_that_do_not_belong_together(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "site": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(CorpusError, match=r"b\.parquet has no column 'site'"):
        rows_of(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorpusError, match="none of its files is Parquet"):
        rows_of(tmp_path / "none")


def test_image_folder_classes_and_splits(tmp_path: Path) -> None:
    for name in ("no/1.png", "no/deep/2.png", "yes/3.jpg", "yes/notes.txt", "yes/.hidden.png"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(png(1))
    corpus, rows = rows_of(tmp_path / "a")
    assert corpus.kind == "imagefolder"
    assert [(row.key, row.labels["label"], row.labels["split"]) for row in rows] == [
        ("no/1.png", "no", None),
        ("no/deep/2.png", "no", None),
        ("yes/3.jpg", "yes", None),
    ]
    for name in ("train/no/1.png", "train/yes/2.png", "test/no/3.png"):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(png(1))
    _, rows = rows_of(tmp_path / "b")
    assert [(row.labels["label"], row.labels["split"]) for row in rows] == [
        ("no", "test"),
        ("no", "train"),
        ("yes", "train"),
    ]


def test_linked_class_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.png").write_bytes(png(1))
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "lung").symlink_to(tmp_path / "real")
    (root / "loop").symlink_to(root)
    assert [row.key for row in rows_of(root)[1]] == ["lung/1.png"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_real_layouts_of_the_shared_data(tmp_path: Path) -> None:
    corpus, rows = rows_of(SHARED / "brain_mri")
    labels = [row.labels["label"] for row in rows]
    assert (labels.count("yes"), labels.count("no")) == (155, 98)
    corpus, rows = rows_of(SHARED / "mmkd_release")
    assert len(rows) == 4
    assert corpus.labels == ("folderid", "metapath", "available_clips")
    assert rows[0].key == "0c04d8aba59b416d892fb3ef8f3c5a83"
    assert (rows[0].caption or "").startswith("Colonoscopy demonstrating segmental")
    assert json.loads(rows[0].labels["available_clips"] or "")[0] == "BMCA"
    assert decode(image_of(corpus, rows[0])).size == (689, 325)
    # PMC-OA's layout: JSONL with `image` and `caption`, the pictures in a folder of their own.
    pairs = SHARED / "pmc_pairs"
    corpus, rows = rows_of(
        described(
            tmp_path, f"kind: table\npath: {pairs}/pretraining_meta_file_sample.jsonl\nimages: {pairs}/sample_images\n"
        )
    )
    assert len(rows) == 70
    assert decode(image_of(corpus, rows[0])).width > 0


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """An uncompressed tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_biomedica_sidecars(tmp_path: Path) -> None:
    sidecar = {
        "image_primary_label": ["Clinical Imaging"],
        "image_secondary_label": ["endoscopy"],
        "n": [9, 8],
    }
    write_tar(tmp_path / "0.tar", {"a.jpg": png(1), "a.txt": b"one\ntwo", "a.json": json.dumps(sidecar).encode()})
    _, rows = rows_of(described(tmp_path, "kind: webdataset\npath: .\nlabel_fields: [image_primary_label, n]\n"))
    assert [(row.caption, row.modality) for row in rows] == [("one\ntwo", "endoscopy")]
    assert rows[0].labels == {"image_primary_label": '["Clinical Imaging"]', "n": "[9, 8]"}


def test_clip_benchmark_layouts(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "c" / "test" / "0.tar", {"s0.webp": png(0), "s0.cls": b"3", "s1.webp": png(1), "s1.cls": b"11"}
    )
    _, rows = rows_of(described(tmp_path / "c", "kind: webdataset\npath: .\nlabel_members: [cls]\n"))
    assert [(row.uri, row.caption, row.labels) for row in rows] == [
        ("test/0.tar", None, {"cls": "3"}),
        ("test/0.tar", None, {"cls": "11"}),
    ]
    write_tar(tmp_path / "r" / "0.tar", {"s0.jpg": png(0), "s0.txt": b"one\n\n two \nthree\n"})
    _, rows = rows_of(described(tmp_path / "r", "kind: webdataset\npath: .\ncaptions: each\n"))
    assert [(row.key, row.caption) for row in rows] == [("s0", "one"), ("s0#1", "two"), ("s0#2", "three")]
    assert {(row.uri, row.offset, row.length) for row in rows} == {("0.tar", rows[0].offset, len(png(0)))}


def test_lists_of_captions_in_json(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar", {"a.png": png(0), "a.json": b'{"caption": ["", "x", 7, "y"]}', "b.json": b'{"caption": []}'}
    )
    assert [row.caption for row in rows_of(tmp_path)[1]] == ["x", ""]
    _, rows = rows_of(described(tmp_path, "kind: webdataset\npath: .\ncaptions: each\n"))
    assert [(row.key, row.caption) for row in rows] == [("a", "x"), ("a#1", "7"), ("a#2", "y"), ("b", "")]
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "a.png", "caption": ["x", "y"]}\n')
    _, rows = rows_of(described(tmp_path, "kind: table\npath: t.jsonl\ncaptions: each\n"))
    assert [(row.key, row.caption, row.uri) for row in rows] == [("a.png", "x", "a.png"), ("a.png#1", "y", "a.png")]


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (b'\xef\xbb\xbfimage,caption\na.png,"x, ""y""\nz"\n', "", ['x, "y"\nz']),
        ("image,caption\na.png,Ödem\n".encode("utf-16"), "", ["Ödem"]),
        ("image,caption\na.png,Ödem\n".encode("latin-1"), "encoding: latin-1", ["Ödem"]),
        (b"a.png,x\nb.png,y\n", "column_names: [image, caption]", ["x", "y"]),
        (b"image;caption\na.png;x,y\n", "delimiter: ';'", ["x,y"]),
        (b'image,caption\na.png,a 5" tube\nb.png,y\n', "quotes: false", ['a 5" tube', "y"]),
        (b"image,caption\r\na.png,x\r\n\r\nb.png,y\r\n", "", ["x", "y"]),
    ],
)
def test_ways_to_write_a_csv(tmp_path: Path, data: bytes, options: str, expected: list[str]) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    _, rows = rows_of(described(tmp_path, f"kind: table\npath: t.csv\n{options}\n"))
    assert [row.caption for row in rows] == expected
    assert [row.fault for row in rows] == [None] * len(expected)


def test_bad_lines_cost_themselves(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('image,caption\na.png,x, y\nb.png\nc.png,z\nd.png,"open\ne.png,lost\n')
    assert [(row.uri, row.fault) for row in rows_of(tmp_path / "t.csv")[1]] == [
        ("a.png", "row: more cells than columns"),
        ("b.png", "row: fewer cells than columns"),
        ("c.png", None),
        ("d.png", "row: a quotation mark is not closed"),
    ]
    deep = "[" * 100_000
    (tmp_path / "t.jsonl").write_text(f'{{"text": "a"}}\n{{bad\n[1]\n{deep}\n{{"text": "\\ud800", "later": 1}}\n')
    corpus, rows = rows_of(tmp_path / "t.jsonl")
    assert [row.fault for row in rows] == [None, *["row: not a JSON object"] * 3, None]
    assert corpus.labels == ("later",)  # a name that only a later line has is not lost
    assert rows[4].labels == {"later": "1"}


@pytest.mark.parametrize(
    ("text", "content", "error", "message"),
    [
        ("kind: table\npath: t.csv\nencoding: utf-99\n", "image\n", ConfigError, "encoding is 'utf-99'"),
        ("kind: table\npath: t.csv\ndelimiter: ab\n", "image\n", ConfigError, "delimiter is 'ab'"),
        ("kind: table\npath: t.csv\ncaptions: all\n", "image\n", ConfigError, "captions"),
        ("kind: table\npath: t.csv\n", "image,image\n1,2\n", CorpusError, "two columns named 'image'"),
        (
            "kind: table\npath: t.csv\n",
            'image,caption\na,"b\n' + "x\n" * 1500 + '"\n',
            CorpusError,
            "not closed within 1000",
        ),
        ("kind: slides\npath: t.csv\nmpp: -1\n", "image\n", ConfigError, "mpp"),
        ("kind: dicom\npath: t.csv\nframes: last\n", "image\n", ConfigError, "frames"),
    ],
)
def test_descriptions_and_tables_that_cannot_be(
    tmp_path: Path, text: str, content: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(error, match=message) as caught:
        rows_of(described(tmp_path, text))
    assert "\n" not in str(caught.value)
