"""Pairs of every layout: both sides are found, one side alone says so, and every ignored input is counted."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_corpus import png

from mmkd.base.errors import CorpusError
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.distill.checkpoint import CONFIG, FOLDER
from mmkd.distill.export import PROVENANCE
from mmkd.distill.pairs import FOLDER as TOKENS
from mmkd.evaluate.plan import PLANS
from mmkd.evaluate.results import RESULTS
from mmkd.extract.corpora import Corpus, corpus_rows, files, open_corpus
from mmkd.extract.corpus_parts import read_overview, write_parts
from mmkd.extract.index import create_indexed_store
from mmkd.extract.limited_corpus import LimitedCorpus, Require
from mmkd.extract.report import Overview
from mmkd.store import FeatureStore


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    """An uncompressed tar of these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pictures(*names: str) -> list[tuple[str, bytes]]:
    """Members that are images."""
    return [(name, png(number)) for number, name in enumerate(names)]


def texts(*names: str) -> list[tuple[str, bytes]]:
    """Members that are captions: their own names."""
    return [(name, name.encode()) for name in names]


def write_files(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    """The members as files."""
    for name, data in members:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def described(folder: Path, **fields: Any) -> Corpus:
    """The corpus of a corpus.yaml."""
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump(fields, allow_unicode=True))
    return open_corpus(str(path))


def listed(corpus: Corpus | Path, store: Path) -> tuple[list[tuple[Any, ...]], Overview]:
    """Key, caption, image present and reason of each row of a new store, and its overview."""
    corpus = open_corpus(str(corpus)) if isinstance(corpus, Path) else corpus
    create_indexed_store(corpus, store)
    overview = read_overview(store)
    assert overview is not None
    rows = FeatureStore.open(store).sample_table().to_pylist()
    for row in rows:
        if row["uri"] is not None and row["status"] != "failed":
            image_source(corpus.root, row["uri"], row["offset"], row["length"]).read()
    assert overview.rows == len(rows)
    assert overview.images == sum(row["uri"] is not None for row in rows)
    assert overview.captions == sum(bool(row["caption"]) for row in rows)
    return [(row["key"], row["caption"], row["uri"] is not None, row["reason"]) for row in rows], overview


def pair(key: str, caption: str, reason: str | None = None) -> tuple[Any, ...]:
    """A row with both sides."""
    return key, caption, True, reason


def test_a_tar_with_all_images_first_gives_pairs(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", *pictures("0.jpg", "1.jpg"), *texts("0.txt", "1.txt"))
    rows, overview = listed(tar, tmp_path / "s")
    assert rows == [pair("0", "0.txt"), pair("1", "1.txt")]
    assert (overview.images, overview.captions, overview.pairs, overview.ignored) == (2, 2, 2, {})


def test_a_key_with_dots_ends_at_the_last_known_suffix(tmp_path: Path) -> None:
    names = ("PMC12_fig.1", "v2.0 scan", "a/b.c")
    members = [one for name in names for one in (*pictures(f"{name}.JPG"), *texts(f"{name}.txt"))]
    expected = [pair(name, f"{name}.txt") for name in names]
    assert listed(write_tar(tmp_path / "a.tar", *members), tmp_path / "s")[0] == expected
    folder = write_files(tmp_path / "files", members)
    assert sorted(listed(folder, tmp_path / "f")[0]) == sorted(expected)


def test_one_side_of_a_corpus_of_pairs_is_said(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", *pictures("s.left.jpg", "s.right.jpg"), *texts("s.txt"))
    rows, overview = listed(tar, tmp_path / "s")
    assert rows == [
        ("s.left", None, True, "pair: no caption"),
        ("s.right", None, True, "pair: no caption"),
        ("s", "s.txt", False, "pair: no image"),
    ]
    assert (overview.images, overview.captions, overview.pairs) == (2, 1, 0)
    assert overview.reasons == {"pair: no caption": (2, "s.left"), "pair: no image": (1, "s")}


def test_named_members_are_the_pair(tmp_path: Path) -> None:
    members = [*pictures("s.left.jpg", "s.right.jpg", "s.input.png"), *texts("s.txt", "s.output.txt")]
    write_tar(tmp_path / "a.tar", *members)
    corpus = described(tmp_path, kind="webdataset", path="a.tar", image_members=["left.jpg"])
    rows, overview = listed(corpus, tmp_path / "s")
    assert rows[0] == pair("s", "s.txt")
    corpus = described(
        tmp_path, kind="webdataset", path="a.tar", image_members=["input.png"], caption_members=["output.txt"]
    )
    rows, overview = listed(corpus, tmp_path / "t")
    assert rows == [pair("s", "s.output.txt")]
    assert overview.ignored == {"member: not among `image_members`, `caption_members`": (3, "s.left.jpg")}


def test_other_image_suffixes_are_images_and_the_rest_is_counted(tmp_path: Path) -> None:
    suffixes = ("jfif", "jpe", "avif", "heic", "ppm", "j2k", "Png", "apng", "dib", "pgm", "jpx")
    members = [one for i, s in enumerate(suffixes) for one in (*pictures(f"{i}.{s}"), *texts(f"{i}.txt"))]
    members += [("x.npy", b"numbers"), ("x.txt", b"x"), ("._0.jpg", b"of a Mac"), ("y.jxl", b""), ("z.npy", b"")]
    expected = [pair(str(i), f"{i}.txt") for i in range(len(suffixes))]
    rows, overview = listed(write_tar(tmp_path / "a.tar", *members), tmp_path / "s")
    assert rows == [*expected, ("x", "x", False, "pair: no image")]
    assert overview.ignored == {
        "member: .npy is not read": (2, "x.npy"),
        "member: hidden": (1, "._0.jpg"),
        "member: .jxl is not read": (1, "y.jxl"),
    }
    folder = write_files(tmp_path / "c", pictures(*(f"cls/x{i}.{s}" for i, s in enumerate(suffixes))))
    (folder / "cls" / "notes.docx").write_bytes(b"")
    rows, overview = listed(folder, tmp_path / "t")
    assert len(rows) == len(suffixes)
    assert overview.ignored == {"file: .docx is not read in a corpus of kind imagefolder": (1, "cls/notes.docx")}


def test_pairs_side_by_side_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    members = [*pictures("00000/0.jpg", "00000/1.jpg", "00001/2.png", "00001/3.jpg"), *texts("00000/0.txt")]
    members += [("00000/0.json", b'{"caption": "not this", "organ": "lung"}'), ("00000/1.json", b'{"caption": "one"}')]
    members += [("00001/2.caption", "\ufefftwo".encode()), ("readme.md", b""), ("00000.parquet.crc", b"")]
    write_files(folder, members)
    rows, overview = listed(folder, tmp_path / "s")
    assert rows == [
        pair("00000/0", "00000/0.txt"),
        pair("00000/1", "one"),
        pair("00001/2", "two"),
        ("00001/3", None, True, "pair: no caption"),
    ]
    assert set(overview.ignored) == {
        "file: .md is not read in a corpus of kind pairs",
        "file: .crc is not read in a corpus of kind pairs",
        "field: of a JSON sidecar, not among `label_fields`",
    }
    corpus = described(tmp_path, kind="pairs", path="c", label_fields=["organ"])
    create_indexed_store(corpus, tmp_path / "t")
    assert FeatureStore.open(tmp_path / "t").sample_table()["organ"].to_pylist() == ["lung", None, None, None]


def test_links_that_lead_nowhere_are_rows(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "c", pictures("a/0.png"))
    for number in (1, 2):
        (folder / "a" / f"{number}.png").symlink_to(tmp_path / ".git" / "annex" / str(number))
    create_indexed_store(open_corpus(str(folder)), tmp_path / "s")
    assert FeatureStore.open(tmp_path / "s").sample_table()["key"].to_pylist() == ["a/0.png", "a/1.png", "a/2.png"]


@pytest.mark.parametrize(
    "table",
    [
        'image, caption\na.png, "one, two"\nb c.png, three\n',
        'Image,caption\na.png,"one, two"\nb c.png,three\n',
        'image,Caption\na.png,"one, two"\nb c.png,three\n',
        "IMAGE ; TEXT\na.png ; one, two\nb c.png;three\n",
        ',image,caption,\n0,a.png,"one, two",\n1,b c.png,three,\n',
        "image\tcaption\na.png\tone, two\nb c.png\tthree\n",
        "image|caption\na.png|one, two\nb c.png|three\n",
    ],
)
def test_headers_as_people_write_them(tmp_path: Path, table: str) -> None:
    write_files(tmp_path, pictures("a.png", "b c.png"))
    (tmp_path / "p.csv").write_text(table)
    rows, overview = listed(tmp_path / "p.csv", tmp_path / "s")
    assert rows == [pair("a.png", "one, two"), pair("b c.png", "three")]
    assert overview.ignored == ({"column: without a name": (2, "p.csv")} if table[0] == "," else {})


def test_lines_of_one_image_are_rows_and_equal_ones_duplicates(tmp_path: Path) -> None:
    write_files(tmp_path, pictures("a.png", "b.png"))
    (tmp_path / "p.csv").write_text("image,caption\na.png,one\na.png,two\nb.png,one\na.png,two\na.png,one\na.png,3\n")
    rows, overview = listed(tmp_path / "p.csv", tmp_path / "s")
    assert rows == [
        pair("a.png", "one"),
        pair("a.png#line-2", "two"),
        pair("b.png", "one"),
        pair("a.png", "two", "key: duplicate of row 0"),
        pair("a.png", "one", "key: duplicate of row 0"),
        pair("a.png#line-6", "3"),
    ]
    assert overview.reasons == {"key: duplicate of an earlier row": (2, "a.png")}
    assert list(overview.lines())[1] == (
        "  2 x key: duplicate of an earlier row, such as a.png (name a key column; set `shard_keys: true` where files "
        "number their rows alike; put an image and its caption into one tar)"
    )


def test_keys_that_every_tar_counts_alike(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in "ab":
        write_tar(tmp_path / "t" / f"{name}.tar", *pictures("0.jpg"), *texts("0.txt"))
    assert listed(tmp_path / "t", tmp_path / "s")[0][1] == pair("0", "0.txt", "key: duplicate of row 0")
    rows, _ = listed(described(tmp_path, kind="webdataset", path="t", shard_keys=True), tmp_path / "u")
    assert rows == [pair("a/0", "0.txt"), pair("b/0", "0.txt")]
    for name in "ab":
        pq.write_table(pa.table({"id": ["0"], "text": [name]}), tmp_path / "t" / f"{name}.parquet")
        (tmp_path / "t" / f"{name}.csv").write_text(f"id,text\n0,{name}\n")
    for kind in ("parquet", "table"):
        rows, _ = listed(described(tmp_path, kind=kind, path="t", shard_keys=True), tmp_path / kind)
        assert [row[:2] for row in rows] == [("a/0", "a"), ("b/0", "b")]


@pytest.mark.parametrize(
    ("require", "statuses"),
    [
        (None, ["pending", "pending", "pending"]),
        ("pairs", ["pending", "failed", "failed"]),
        ("images", ["pending", "pending", "failed"]),
        ("texts", ["pending", "failed", "pending"]),
    ],
)
def test_one_side_may_be_required(tmp_path: Path, require: Require | None, statuses: list[str]) -> None:
    tar = write_tar(tmp_path / "a.tar", *pictures("0.jpg", "1.jpg"), *texts("0.txt", "2.txt"))
    create_indexed_store(LimitedCorpus(open_corpus(str(tar)), None, require), tmp_path / "s")
    rows = FeatureStore.open(tmp_path / "s").sample_table().to_pylist()
    assert [row["status"] for row in rows] == statuses
    left_out = [f"row: no {side}, left out by --require {require}" for side in ("caption", "image")]
    given = [None, "pair: no caption", "pair: no image"] if require is None else [None, *left_out]
    assert [row["reason"] for row in rows] == [
        reason if require is None or status == "failed" else None
        for reason, status in zip(given, statuses, strict=True)
    ]


def test_stores_runs_and_results_are_no_part_of_a_corpus(tmp_path: Path) -> None:
    corpus = write_files(
        tmp_path / "c", [*pictures("a.png", "run/samples.png"), ("pairs.csv", b"image,caption\na.png,one\n")]
    )
    create_indexed_store(open_corpus(str(corpus)), corpus / "store")
    write_files(corpus, [("run/run.json", b"{}"), ("run/checkpoints/a.safetensors", b""), ("out/plans/a.json", b"{}")])
    (corpus / "out" / "results.jsonl").write_text('{"image": "a.png"}\n')
    assert listed(corpus, tmp_path / "s")[0] == [pair("a.png", "one")]
    (corpus / "pairs.csv").unlink()
    rows, overview = listed(corpus, tmp_path / "t")
    assert [row[0] for row in rows] == ["a.png"]
    assert {reason: example for reason, (_, example) in overview.ignored.items()} == {
        "folder: a store of mmkd, never part of a corpus": "store",
        "folder: a training run of mmkd, never part of a corpus": "run",
        "folder: an evaluation of mmkd, never part of a corpus": "out",
    }
    with pytest.raises(CorpusError, match="is a store of mmkd, not a corpus"):
        open_corpus(str(corpus / "store"))


def test_parquet_types_that_tables_have(tmp_path: Path) -> None:
    one, two = png(1), png(2)
    text = pa.array(["a", "b"])
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns: dict[str, pa.Array] = {
        "view": pa.array([one, two], pa.binary_view()),
        "large": pa.array([one, two], pa.large_binary()),
        "fixed": pa.array([one.ljust(4000, b"\0"), two.ljust(4000, b"\0")], pa.binary(4000)),
        "dictionary": pa.array(["x.png", "x.png"]).dictionary_encode(),
        "paths": pa.array([["x.png", "y.png"], ["y.png"]]),
        "bytes": pa.array([[one, two], [two]], pa.list_(pa.binary())),
        "structs": pa.array([[{"bytes": one, "path": "p"}], [{"bytes": None, "path": "x.png"}]], pa.list_(struct)),
    }
    write_files(tmp_path, pictures("x.png", "y.png"))
    for name, images in columns.items():
        pq.write_table(pa.table({"image": images, "caption": text}), tmp_path / f"{name}.parquet")
        rows, overview = listed(tmp_path / f"{name}.parquet", tmp_path / name)
        assert [row[1:] for row in rows] == [("a", True, None), ("b", True, None)], name
        further = 1 if name in ("paths", "bytes") else 0
        assert sum(count for count, _ in overview.ignored.values()) == further
    corpus = described(tmp_path, kind="parquet", path="bytes.parquet", pictures="each")
    create_indexed_store(corpus, tmp_path / "each")
    rows = FeatureStore.open(tmp_path / "each").sample_table().to_pylist()
    data = [image_source(corpus.root, row["uri"]).read() for row in rows]
    assert data == [one, two, two]
    assert [row["key"] for row in rows] == ["bytes.parquet:0", "bytes.parquet:0@1", "bytes.parquet:1"]


@pytest.mark.parametrize("images", [pa.nulls(2), pa.array([None, None], pa.binary()), pa.array([None, ""])])
def test_a_column_without_any_image_is_said(tmp_path: Path, images: pa.Array) -> None:
    pq.write_table(pa.table({"image": images, "caption": ["a", "b"]}), tmp_path / "p.parquet")
    rows, _ = listed(tmp_path / "p.parquet", tmp_path / "s")
    assert [row[1:] for row in rows] == [("a", False, "pair: no image"), ("b", False, "pair: no image")]


@pytest.mark.parametrize("images", [pa.array([1, 2]), pa.array([[[1]], [[2]]])])
def test_a_column_of_numbers_is_refused_in_one_line(tmp_path: Path, images: pa.Array) -> None:
    pq.write_table(pa.table({"image": images, "caption": ["a", "b"]}), tmp_path / "p.parquet")
    with pytest.raises(CorpusError, match=r"column 'image' holds .*int64.*, expected encoded images or paths"):
        listed(tmp_path / "p.parquet", tmp_path / "s")


def test_a_dot_in_a_column_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image.bytes": [png(1)], "text": ["a"]}), tmp_path / "p.parquet")
    corpus = described(tmp_path, kind="parquet", path="p.parquet", columns={"image": "image.bytes"})
    assert listed(corpus, tmp_path / "s")[0] == [pair("p.parquet:0", "a")]


def test_captions_of_every_kind(tmp_path: Path) -> None:
    values = [7, 2.5, True, "genuine \ufffd", "\ufeffmarked", "\u200b\u200d\ufeff", {"de": "x"}, ["", 3], None]
    lines = [json.dumps({"id": str(i), "text": value}) for i, value in enumerate(values)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows, _ = listed(tmp_path / "p.jsonl", tmp_path / "s")
    assert [row[1] for row in rows] == ["7", "2.5", "true", "genuine \ufffd", "marked", "", "", "3", ""]
    assert rows[6][3] == "caption: a mapping, expected text"
    data = [b"\xef\xbb\xbfmarked", "Ödem".encode("utf-16"), "genuine \ufffd".encode(), b"na\xefve"]
    members = [one for i, text in enumerate(data) for one in ((f"{i}.jpg", png(i)), (f"{i}.txt", text))]
    rows, _ = listed(write_tar(tmp_path / "a.tar", *members), tmp_path / "t")
    assert [row[1] for row in rows] == ["marked", "Ödem", "genuine \ufffd", "na\ufffdve"]
    assert [row[3] for row in rows] == [None, None, None, "caption: not UTF-8"]


def test_paths_through_a_link_in_another_form_or_with_backslashes(tmp_path: Path) -> None:
    real = write_files(
        tmp_path / "real" / "data", pictures("a.png", unicodedata.normalize("NFD", "Röntgen.png"), "d/b.png")
    )
    (tmp_path / "link").symlink_to(tmp_path / "real")
    table = tmp_path / "link" / "data" / "p.csv"
    images = [tmp_path / "link/data/a.png", unicodedata.normalize("NFC", "Röntgen.png"), "d\\b.png", real / "d/b.png"]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((image, "x") for image in images)])
    corpus = open_corpus(str(table))
    create_indexed_store(corpus, tmp_path / "s")
    uris = FeatureStore.open(tmp_path / "s").sample_table()["uri"].to_pylist()
    assert [len(image_source(corpus.root, uri).read()) > 0 for uri in uris] == [True] * 4
    assert uris[0] == "a.png"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "home" / "c", [*pictures("i/a.png"), ("p.csv", b"image,caption\na.png,one\n")])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_corpus("~/c/p.csv").labels == ()
    corpus = described(tmp_path, kind="table", path="~/c/p.csv", images="~/c/i")
    assert listed(corpus, tmp_path / "s")[0] == [pair("a.png", "one")]


def test_a_json_array_says_what_to_do(tmp_path: Path) -> None:
    for text in ('[{"image": "a.png"}]', '[\n{"image": "a.png"}\n]'):
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(CorpusError, match=r"jq -c '\.\[\]'") as caught:
            listed(tmp_path / "p.jsonl", tmp_path / "s")
        assert "\n" not in str(caught.value)


def test_columns_that_are_not_used_are_counted(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("image,caption,organ,age\na.png,one,lung,3\n")
    write_files(tmp_path, pictures("a.png"))
    corpus = described(tmp_path, kind="table", path="p.csv", label_columns=["organ"])
    assert listed(corpus, tmp_path / "s")[1].ignored == {"column: not among `label_columns`": (1, "age")}
    pq.write_table(pa.table({"image": [png(1)], "caption": ["one"], "mask": [b"x"]}), tmp_path / "p.parquet")
    assert listed(tmp_path / "p.parquet", tmp_path / "t")[1].ignored == {"column: holds bytes": (1, "mask")}


def test_the_overview_survives_its_file(tmp_path: Path) -> None:
    overview = Overview()
    overview.add_row("a", image=True, caption=False, reason="pair: no caption")
    (tmp_path / "s" / "runs").mkdir(parents=True)
    assert read_overview(tmp_path / "s") is None
    write_parts(tmp_path / "s", "", [], overview)
    assert read_overview(tmp_path / "s") == overview


def test_a_table_found_in_its_folder_counts_what_lies_beside_it(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "c", pictures("a.png", "d/b.png", "c.png", "e.png"))
    (folder / "pairs.csv").write_text("image,caption\na.png,one\n./d/../d/b.png,two\n")
    write_files(folder, texts("notes.md", "d/other.csv"))
    rows, overview = listed(folder, tmp_path / "s")
    assert rows == [pair("a.png", "one"), pair("./d/../d/b.png", "two")]
    assert overview.ignored == {
        "image: no row names it": (2, "c.png"),
        "file: .csv is not read in a corpus of kind table": (1, "d/other.csv"),
        "file: .md is not read in a corpus of kind table": (1, "notes.md"),
    }
    assert listed(folder / "pairs.csv", tmp_path / "t")[1].ignored == {}


def test_members_with_further_names_are_rows_with_one_side_and_say_how_to_pair_them(tmp_path: Path) -> None:
    members = [*pictures("s.input.jpg"), *texts("s.output.txt")]
    expected = [("s.input", None, True, "pair: no caption"), ("s.output", "s.output.txt", False, "pair: no image")]
    for place in (write_tar(tmp_path / "a.tar", *members), write_files(tmp_path / "c", members)):
        rows, overview = listed(place, tmp_path / f"{place.name}.store")
        assert rows == expected
        for line in list(overview.lines())[1:]:
            assert "in `image_members` or `caption_members`" in line
    corpus = described(tmp_path, kind="pairs", path="c", image_members=["input.jpg"], caption_members=["output.txt"])
    assert listed(corpus, tmp_path / "s")[0] == [pair("s", "s.output.txt")]


def test_fields_and_faults_of_a_sidecar_are_counted(tmp_path: Path) -> None:
    sidecar = json.dumps({"caption": "not this", "url": "u", "organ": "lung"}).encode()
    members = [*pictures("0.jpg", "1.jpg"), *texts("0.txt", "1.txt"), ("0.json", sidecar), ("1.json", b"{")]
    write_tar(tmp_path / "a.tar", *members)
    corpus = described(tmp_path, kind="webdataset", path="a.tar", label_fields=["organ"])
    rows, overview = listed(corpus, tmp_path / "s")
    assert rows == [pair("0", "0.txt"), pair("1", "1.txt")]
    assert overview.ignored == {
        "field: of a JSON sidecar, not among `label_fields`": (2, "caption"),
        "member: sidecar is not JSON": (1, "1.json"),
    }


def test_further_captions_of_a_list_are_counted(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": ["a", "", "b", "c"]}\n')
    rows, overview = listed(tmp_path / "p.jsonl", tmp_path / "s")
    assert rows == [("line-1", "a", False, None)]
    assert overview.ignored == {"caption: a further one of its row": (2, "line-1")}
    assert len(listed(described(tmp_path, kind="table", path="p.jsonl", captions="each"), tmp_path / "t")[0]) == 3


def test_what_a_limit_leaves_out_is_counted(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in "abc":
        write_tar(tmp_path / "t" / f"{name}.tar", *pictures(*(f"{name}{number}.jpg" for number in range(3))))
    rows, overview = listed(LimitedCorpus(open_corpus(str(tmp_path / "t")), 1), tmp_path / "s")
    assert [row[0] for row in rows] == ["a0"]
    assert overview.ignored == {
        "row: after the first 1 rows (--limit)": (2, "a1"),
        "file: after the first 1 rows (--limit)": (2, "b.tar"),
    }
    rows, overview = listed(LimitedCorpus(open_corpus(str(tmp_path / "t")), 3, count_rest=False), tmp_path / "u")
    assert (len(rows), overview.ignored) == (3, {})


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("sep=;\nimage;caption\na.png;one\n", [pair("a.png", "one")]),
        ('image;caption;"size, mm"\na.png;one, two;0,5\n', [pair("a.png", "one, two")]),
        ("\n\nimage;caption\n\n \na.png;one\n", [pair("a.png", "one")]),
        ("image,caption\na.png,one,\n", [pair("a.png", "one")]),
        ("image,caption\na.png,one,two\n", [pair("a.png", "one", "row: more cells than columns")]),
        ("image,caption\ra.png,one\r", [pair("a.png", "one")]),
        ("image,caption\na.png,\n", [pair("a.png", "", "caption: empty")]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_tables_as_spreadsheets_write_them(
    tmp_path: Path, table: str, rows: list[tuple[Any, ...]], encoding: str
) -> None:
    write_files(tmp_path, pictures("a.png"))
    (tmp_path / "p.csv").write_bytes(table.encode(encoding))
    assert listed(tmp_path / "p.csv", tmp_path / "s")[0] == rows


def test_utf_16_without_its_mark_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes("image,caption\na.png,one\n".encode("utf-16-le"))
    with pytest.raises(CorpusError, match="say `encoding: utf-16-le`"):
        listed(tmp_path / "p.csv", tmp_path / "s")


def test_every_line_of_a_jsonl_names_columns(tmp_path: Path) -> None:
    write_files(tmp_path, pictures("a.png", "b.png"))
    lines = [
        "{}",
        '{"caption": "x"}',
        '{"image": {"path": "a.png"}, "caption": NaN}',
        '{"image": "b.png", "caption": "y"}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, '{"caption": "x", "caption": "y"}', '{"caption": [["x"]]}']))
    rows, _ = listed(tmp_path / "p.jsonl", tmp_path / "s")
    assert rows == [
        ("line-1", "", False, "key: neither image nor caption"),
        ("line-2", "x", False, "pair: no image"),
        ("a.png", "", True, "caption: empty"),
        pair("b.png", "y"),
        ("line-5", "", False, "row: a field stands twice"),
        ("line-6", "", False, "caption: a list in a list, expected text"),
    ]


def test_columns_of_later_tables_are_counted(tmp_path: Path) -> None:
    for number, further in ((1, {}), (2, {"organ": ["lung"]})):
        pq.write_table(pa.table({"caption": ["x"], **further}), tmp_path / f"{number}.parquet")
        (tmp_path / f"{number}.csv").write_text("caption,organ\nx,lung\n" if further else "caption\nx\n")
    for kind in ("parquet", "table"):
        overview = listed(described(tmp_path, kind=kind, path="."), tmp_path.parent / f"{tmp_path.name}.{kind}")[1]
        assert overview.ignored["column: not in the first table"] == (1, "organ")


def test_parquet_with_a_column_twice_or_without_a_name(tmp_path: Path) -> None:
    texts = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([texts] * 3, names=["caption", "", ""]), tmp_path / "a.parquet")
    rows, overview = listed(tmp_path / "a.parquet", tmp_path / "s")
    assert (len(rows), overview.ignored) == (1, {"column: without a name": (2, "a.parquet")})
    pq.write_table(pa.Table.from_arrays([texts] * 3, names=["caption", "l", "l"]), tmp_path / "b.parquet")
    with pytest.raises(CorpusError, match="two columns named 'l'"):
        listed(tmp_path / "b.parquet", tmp_path / "t")


def test_bytes_are_text_where_text_is_meant(tmp_path: Path) -> None:
    columns = {"id": [b"k", b"l"], "image_bytes": [png(1), png(2)], "text": [b"one", "Ö".encode()]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    assert listed(tmp_path / "p.parquet", tmp_path / "s")[0] == [pair("k", "one"), pair("l", "Ö")]


def test_paths_that_leave_the_folder_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "c", pictures("i/a.png"))
    (tmp_path / "alias.png").symlink_to(folder / "i" / "a.png")
    monkeypatch.setenv("HOME", str(folder))
    paths = ["../c/i/a.png", f"{tmp_path}/alias.png", "~/i/a.png", f"file://{folder}/i/a.png", f"{folder}/i/../i/a.png"]
    (folder / "p.csv").write_text("id,image,caption\n" + "".join(f"{n},{path},x\n" for n, path in enumerate(paths)))
    assert listed(folder / "p.csv", tmp_path / "s")[0] == [pair(str(n), "x") for n in range(5)]
    (folder / "p.csv").write_text("image\n../a.png\nhttps://example.com/a.png\n/etc/passwd\n")
    corpus = open_corpus(str(folder / "p.csv"))
    for row in corpus_rows(corpus):
        with pytest.raises(ImageError, match="leaves the corpus folder"):
            image_source(corpus.root, row.uri or "").read()


def test_one_path_inside_a_tar_may_be_written_in_two_ways(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", *pictures("./d/0.jpg"), *texts("d/./0.txt"))
    assert listed(tar, tmp_path / "s")[0] == [pair("d/0", "d/./0.txt")]


def test_folders_are_known_by_the_files_that_runs_and_evaluations_write(tmp_path: Path) -> None:
    expected = {
        "zarr.json": ("a store", ("samples/",)),
        CONFIG: ("a training run", (f"{FOLDER}/", f"{TOKENS}/")),
        PROVENANCE: ("an exported student", ("open_clip_config.json",)),
        RESULTS: ("an evaluation", (f"{PLANS}/",)),
    }
    assert expected == files._WRITTEN_BY_MMKD


def test_the_files_of_img2dataset_with_their_metadata_are_pairs(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "c", [*pictures("00000/0.jpg"), *texts("00000/0.txt"), ("00000_stats.json", b"{}")])
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), folder / "00000.parquet")
    rows, overview = listed(folder, tmp_path / "s")
    assert rows == [
        ("00000_stats", "", False, "caption: sidecar has no field 'caption'"),
        pair("00000/0", "00000/0.txt"),
    ]
    assert overview.ignored == {"file: .parquet is not read in a corpus of kind pairs": (1, "00000.parquet")}


def test_pictures_beside_parquet_are_counted(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "c", pictures("a.png", "b.png"))
    for images in (["a.png"], [png(1)]):
        pq.write_table(pa.table({"image": images, "caption": ["one"]}), folder / "p.parquet")
        _, overview = listed(folder, tmp_path / str(type(images[0])))
        assert overview.ignored["image: no row names it"][0] == (1 if images == ["a.png"] else 2)


def test_questions_in_another_language_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path, pictures("a.png"))
    questions = [
        {"qid": i, "q_lang": lang, "image": "a.png", "question": "?"} for i, lang in enumerate(["en", "zh", "de"])
    ]
    (tmp_path / "test.json").write_text(json.dumps(questions))
    rows, overview = listed(described(tmp_path, kind="vqa", path="test.json"), tmp_path / "s")
    assert [row[0] for row in rows] == ["test/0"]
    assert overview.ignored == {"question: not in the `language`": (2, "test.json")}
