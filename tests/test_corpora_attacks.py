"""Corpora that mean harm: names, links, bombs, floods. None writes, none reads outside, each has its line."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import png

from mmkd.base.errors import CorpusError
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.extract.corpora.samples import Damage, tar_members
from mmkd.extract.index import create_indexed_store
from mmkd.store import FeatureStore


def tree(root: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    """A member with any header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def indexed(location: Path, store: Path) -> list[dict[str, object]]:
    """The rows of a store made of it."""
    create_indexed_store(open_corpus(str(location)), store)
    return FeatureStore.open(store).sample_table().to_pylist()


def test_tar_members_never_touch_the_file_system(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    with tarfile.open(corpus / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "../../outside.png", png(2))
        add(tar, "/etc/absolute.png", png(3))
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="../secret.png")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="../../outside.png")
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "device.png", type=tarfile.CHRTYPE)
        add(tar, "new\nline\x1b[31m.png", png(4))
        add(tar, "x" * 5000 + ".png", png(5))
    before = tree(tmp_path)
    rows = indexed(corpus, tmp_path / "store")
    assert {path for path in tree(tmp_path) if not path.startswith("store")} == before
    assert {row["uri"] for row in rows} == {"0.tar"}
    assert [str(row["key"])[:20] for row in rows] == ["../../outside", "/etc/absolute", "new\nline\x1b[31m", "x" * 20]
    assert [row["reason"] for row in rows] == [None, None, None, "key: longer than 4,096 characters"]
    for row, seed in zip(rows, (2, 3, 4), strict=False):
        source = image_source(str(corpus), str(row["uri"]), int(str(row["offset"])), int(str(row["length"])))
        assert source.read() == png(seed)


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.png",
        "a/../../secret.png",
        "{root}/../secret.png",
        "/etc/passwd",
        "http://example.org/a.png",
        "a\0.png",
    ],
)
def test_a_row_cannot_leave_the_corpus(tmp_path: Path, uri: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    root = tmp_path / "corpus"
    root.mkdir()
    with pytest.raises(ImageError, match="leaves the corpus folder"):
        image_source(str(root), uri.format(root=root)).read()
    (root / "in.png").write_bytes(png(2))
    assert image_source(str(root), str(root / "in.png")).read() == png(2)  # absolute, but inside
    assert image_source("/", str(tmp_path / "secret.png")).read() == png(1)  # `images: /` allows everything


def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not an ordinary file"):
        image_source(str(tmp_path), "a.png").read()
    with pytest.raises(ImageError, match="not an ordinary file"):
        image_source("/", "/dev/zero").read()


def test_a_header_as_long_as_its_archive_is_not_read() -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    sound = tarfile.TarInfo("a.txt")
    data = sound.tobuf(tarfile.USTAR_FORMAT) + info.tobuf(tarfile.GNU_FORMAT) + b"x" * 2048
    *_, last = tar_members(io.BytesIO(data), "t")
    assert isinstance(last, Damage)


@pytest.mark.parametrize("cut", range(513, 6000, 457))
def test_a_tar_cut_anywhere_lists_what_is_left_and_says_so(tmp_path: Path, cut: int) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for i in range(3):
            add(tar, f"k{i}.png.bin", b"p" * 700)
            add(tar, f"k{i}.png", bytes([i]) * 700)
            add(tar, f"k{i}.txt", b"t" * 600)
    (tmp_path / "0.tar").write_bytes(whole.getvalue()[:cut])
    corpus = open_corpus(str(tmp_path / "0.tar"))
    *rows, last = corpus_rows(corpus)
    assert last.fault == "archive: ends early or is damaged, what follows is lost"
    for i, row in enumerate(rows):
        end = (row.offset or 0) + (row.length or 0)
        if end <= cut:
            assert image_source(corpus.root, row.uri or "", row.offset, row.length).read() == bytes([i]) * 700
        else:
            with pytest.raises(ImageError, match="archive ends inside this member"):
                image_source(corpus.root, row.uri or "", row.offset, row.length).read()
        assert row.caption in (None, "t" * 600, "")
        assert (row.fault is not None) == (row.caption == "")


def test_a_caption_cut_off_with_its_tar_has_its_reason(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", png(1))
        add(tar, "a.txt", b"t" * 600)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[: 512 + -(-len(png(1)) // 512) * 512 + 600])
    rows = indexed(tmp_path / "0.tar", tmp_path / "store")
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("pending", "caption: archive ends inside this member"),
        ("failed", "archive: ends early or is damaged, what follows is lost"),
    ]


def test_absurd_captions_labels_and_sidecars_are_bounded(tmp_path: Path) -> None:
    long = json.dumps({"text": "a" * (1 << 21), "site": "s" * (1 << 20)})
    (tmp_path / "t.jsonl").write_text(long + '\n{"text": "b"}\n')
    rows = indexed(tmp_path / "t.jsonl", tmp_path / "store")
    assert [(row["caption"], row["reason"]) for row in rows] == [
        ("", "caption: longer than 1,048,576 characters"),
        ("b", None),
    ]
    assert len(str(rows[0]["site"])) == 1 << 16
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", png(1))
        add(tar, "a.txt", b"t" * ((1 << 20) + 1))
        add(tar, "b.png", png(1))
        add(tar, "b.json", b'{"caption": ' + b"[" * 100_000)
        add(tar, "c.png", png(1))
        add(tar, "c.json", b'["a list"]')
    assert [row.fault for row in corpus_rows(open_corpus(str(tmp_path / "0.tar")))] == [
        "caption: sidecar larger than 1 MB",
        "caption: sidecar is not JSON",
        "caption: sidecar is not a JSON object",
    ]


def bomb(kind: str) -> bytes:
    """The headers of huge pictures; whoever believes them takes gigabytes for what follows."""
    if kind == "PNG":
        header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT" + zlib.compress(b"") + b"\0" * 4
    if kind == "GIF":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0)
            + b","
            + struct.pack("<HHHHBBB", 0, 0, 9, 9, 0, 8, 0)
            + b";"
        )
    sizes = struct.pack("<IIiiHHIIiiII", 54, 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHH", 54, 0, 0) + sizes


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_decompression_bombs(kind: str) -> None:
    with pytest.raises(ImageError, match="more than 134,217,728 pixels"):
        decode(bomb(kind))


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"SIMPLE  =" + b" " * 2871])
def test_formats_that_run_programs_or_are_no_pictures_are_not_tried(data: bytes) -> None:
    with pytest.raises(ImageError, match="not an image that Pillow knows"):
        decode(data)


class Mine:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_no_pickles_from_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Mine())
    (tmp_path / "c").mkdir()
    with tarfile.open(tmp_path / "c" / "0.tar", "w") as tar:
        for suffix in ("png", "json", "txt", "cls", "pyd", "npy", "pt"):
            add(tar, f"a.{suffix}", data)
    (tmp_path / "corpus.yaml").write_text("kind: webdataset\npath: c\nlabel_members: [cls, npy]\n")
    rows = indexed(tmp_path / "corpus.yaml", tmp_path / "store")
    assert len(rows) == 1
    buffer = io.BytesIO()
    np.save(buffer, np.array([Mine()], dtype=object), allow_pickle=True)
    for harm in (data, buffer.getvalue()):
        with pytest.raises(ImageError):
            decode(harm)
    assert not (tmp_path / "unpickled").exists()


def test_parquet_that_lies_about_a_cell(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0)] * 40, "text": ["a"] * 40}), tmp_path / "t.parquet", compression="none")
    corpus = open_corpus(str(tmp_path / "t.parquet"))
    uri = next(corpus_rows(corpus)).uri or ""
    for wrong in (uri.replace("row=0", "row=99"), uri.replace("column=image", "column=imago")):
        with pytest.raises(ImageError, match="damaged Parquet"):
            image_source(corpus.root, wrong).read()
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[4:24] = b"\xff" * 20  # the first page's header
    (tmp_path / "t.parquet").write_bytes(bytes(data))
    with pytest.raises(ImageError, match="damaged Parquet"):
        image_source(corpus.root, uri).read()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"image,caption,gr\xf6\xdfe\na.png,x,3\n"),
        ("a.jsonl", b'{"image": "a.png", "caption": "x", "a\\ud800": 1}\n'),
        ("b.jsonl", b'{"image": "a.png", "caption": "x"}\n{"image": "b.png", "caption": "y", "a\\ud800": 1}\n'),
    ],
)
def test_a_column_whose_name_is_not_utf8_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=r"has a column '.*\ufffd.*', which is not UTF-8; set `encoding`"):
        indexed(tmp_path / name, tmp_path / "store")


def test_a_path_that_is_not_utf8_fails_its_row(tmp_path: Path) -> None:
    lines = b'{"image": "\\ud800.png", "caption": "x"}\n{"image": "\\ud800.png", "caption": "z"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines + b'{"image": "b.png", "caption": "y"}\n')
    reason = "row: image path is too long or not UTF-8"
    rows = indexed(tmp_path / "a.jsonl", tmp_path / "store")
    assert [(row["uri"], row["reason"]) for row in rows] == [
        ("\ufffd.png", reason),
        ("\ufffd.png", "key: duplicate of row 0"),
        ("b.png", None),
    ]
