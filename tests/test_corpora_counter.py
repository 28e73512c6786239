"""Random corpora of every format: an independent count of their inputs agrees with the rows and what is ignored."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.extract.corpora import Corpus, open_corpus
from mmkd.extract.corpora.samples import PairsCorpus
from mmkd.extract.index import list_corpus
from mmkd.extract.report import Overview

EXAMPLES = int(os.environ.get("MMKD_FUZZ_EXAMPLES", "15"))
STEMS = st.sampled_from(["0", "1", "a.b", "a", "fig.1.2", "d/0", "d/e.f", ".hidden", "ü", "a b"])
SUFFIXES = ("jpg", "JPEG", "jfif", "avif", "dcm", "txt", "caption", "npy", "jxl", "left.png", "x.txt", "")
NAMES = st.builds(lambda stem, suffix: f"{stem}.{suffix}".rstrip("."), STEMS, st.sampled_from(SUFFIXES))


def check_count(corpus: Corpus, members: int) -> None:
    """Every member is an image, a caption, or ignored."""
    overview = list_corpus(corpus)
    assert overview.images + overview.captions + sum(count for count, _ in overview.ignored.values()) == members


@settings(max_examples=EXAMPLES)
@given(st.lists(NAMES, max_size=24))
def test_every_member_of_a_tar_is_used_or_counted(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        with tarfile.open(path, "w") as tar:
            for name in ("sound.jpg", *names):
                info = tarfile.TarInfo(name)
                info.size = 5
                tar.addfile(info, io.BytesIO(b"bytes"))
        check_count(open_corpus(str(path)), len(names) + 1)


@settings(max_examples=EXAMPLES)
@given(st.lists(NAMES, max_size=24, unique=True))
def test_every_file_of_a_folder_is_used_or_counted(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sound.jpg", *names):
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_bytes(b"bytes")
        check_count(PairsCorpus(path=folder), 1 + sum(not name.startswith(".") for name in names))


TEXT = st.text(st.characters(categories=["L", "N", "P"]), max_size=12)
CELLS = st.one_of(
    st.sampled_from(
        ["", " ", "a.png", "d/b.png", "d\\b.png", "../a.png", "/a.png", "\ufeff", "\u200b", "nan", '"', "a\nb"]
    ),
    TEXT,
)
VALUES = st.one_of(
    st.none(),
    CELLS,
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(st.one_of(st.none(), CELLS, st.floats()), max_size=4),
)
COLUMNS = st.lists(
    st.sampled_from(["image", "Caption", "text", "filepath", "id", "organ", " Image", "modality", ""]),
    unique_by=str.strip,
    max_size=6,
).map(lambda names: ["caption", *(name for name in names if name != "Caption")])


def image_paths(value: Any) -> list[str]:
    """Paths in a cell: whatever is not missing and not blank."""
    items = value if isinstance(value, list) else [value]
    missing = [item is None or (isinstance(item, float) and math.isnan(item)) for item in items]
    texts = [str(item) for item, absent in zip(items, missing, strict=True) if not absent]
    return [text for text in texts if text.strip()]


def check_table(corpus: Corpus, lines: int, cells: int) -> Overview:
    """Every line is a row, and no column vanishes."""
    overview = list_corpus(corpus)
    columns = sum(count for reason, (count, _) in overview.ignored.items() if reason.startswith("column"))
    assert overview.rows == lines
    assert len(corpus.roles) + len(corpus.labels) + columns == cells  # type: ignore[attr-defined]
    return overview


def further(overview: Overview, what: str) -> int:
    """Inputs of one kind that are ignored because their line has another."""
    return overview.ignored.get(f"{what}: a further one of its {'line' if what == 'image' else 'row'}", (0, ""))[0]


@settings(max_examples=EXAMPLES)
@given(st.data(), COLUMNS, st.sampled_from(",;|\t"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_every_line_and_column_of_a_csv_is_used_or_counted(
    data: st.DataObject, columns: list[str], delimiter: str, encoding: str
) -> None:
    lines = data.draw(st.lists(st.lists(CELLS, min_size=len(columns), max_size=len(columns)), min_size=1, max_size=8))
    if len(columns) == 1:  # an empty line of a table of one column is no line
        lines = [line for line in lines if line[0].strip()] or [["x"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.csv")
        with path.open("w", newline="", encoding=encoding) as file:
            csv.writer(file, delimiter=delimiter).writerows([columns, *lines])
        corpus = open_corpus(str(path))
        overview = check_table(corpus, len(lines), len(columns))
        place = (
            [name.strip() for name in columns].index(corpus.roles["image"].strip()) if "image" in corpus.roles else None
        )  # type: ignore[attr-defined]
        assert overview.images == sum(place is not None and bool(line[place].strip()) for line in lines)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(st.dictionaries(st.sampled_from(["image", "organ", "x y", "id"]), VALUES), min_size=1, max_size=8), VALUES
)
def test_every_line_and_value_of_a_jsonl_is_used_or_counted(lines: list[dict[str, Any]], caption: Any) -> None:
    lines[0] |= {"caption": caption}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "p.jsonl")
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        names = {name for line in lines for name in line}
        overview = check_table(open_corpus(str(file)), len(lines), len(names))
        images = [path for line in lines for path in image_paths(line.get("image"))]
        assert overview.images + further(overview, "image") == len(images)


@settings(max_examples=EXAMPLES)
@given(
    st.data(), COLUMNS, st.integers(1, 8), st.sampled_from(["bytes", "paths", "struct", "list", "dictionary", "null"])
)
def test_every_row_and_column_of_a_parquet_is_used_or_counted(
    data: st.DataObject, columns: list[str], rows: int, images: str
) -> None:
    columns = [name for name in columns if name.strip().lower() not in ("image", "filepath")]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"bytes": pa.binary(), "paths": pa.string(), "struct": struct, "list": pa.list_(struct), "null": pa.null()}
    cell = st.one_of(st.none(), st.just(b"x"), st.just("p"))
    cells = data.draw(st.lists(st.lists(cell, max_size=3), min_size=rows, max_size=rows))

    def filled(item: bytes | str | None) -> dict[str, Any] | None:
        return (
            None if item is None else {"bytes": item if item == b"x" else None, "path": item if item == "p" else None}
        )

    first = [(line or [None])[0] for line in cells]
    count = sum(item is not None for item in first)
    if images == "list":
        values: Any = [[filled(item) for item in line] for line in cells]
        count = sum(item is not None for line in cells for item in line)
    elif images == "struct":
        values = [filled(item) for item in first]
    elif images == "null":
        values, count = [None] * rows, 0
    else:
        values = [None if item is None else (b"x" if images == "bytes" else "p") for item in first]
    array = pa.array(values, kinds.get(images, pa.string()))
    captions = data.draw(st.lists(st.one_of(st.none(), TEXT), min_size=rows, max_size=rows))
    table = pa.Table.from_arrays(
        [
            array.dictionary_encode() if images == "dictionary" else array,
            *(pa.array(captions, pa.string()) for _ in columns),
        ],
        names=["image", *columns],
    )
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder, "p.parquet"), row_group_size=3)
        overview = check_table(open_corpus(str(Path(folder, "p.parquet"))), rows, len(columns) + 1)
    assert overview.images + further(overview, "image") == count
    assert overview.captions == sum(map(bool, captions))
