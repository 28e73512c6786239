"""docs/format.md is enough: a reader and a writer by its rules, with nothing of ours, agree with ours."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr
from format_reader import crc32c, read_inputs, read_selection, read_store
from format_writer import write_store
from tiny_store import make_card, make_index, make_selection, make_store

from mmkd.store import FeatureStore
from mmkd.store.card import TeacherCard
from mmkd.store.hierarchy import array_document
from mmkd.store.inputs import Inputs, write_inputs
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part
from mmkd.store.writer import ShardFeatures, add_teacher, append_rows, write_shard

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "format.md"


def test_a_reader_written_from_the_document_reads_a_store(tmp_path: Path) -> None:
    cards = [make_card("alpha", 8), make_card("beta", 5).with_encoding("float32")]
    cards.append(make_card("gamma", 6).with_encoding("int8"))
    _, written = make_store(tmp_path / "s", 300, cards)
    (tmp_path / "s/ledger/00001.alpha.json").unlink()
    read = read_store(tmp_path / "s")
    store = FeatureStore.open(tmp_path / "s")
    assert read[""] == store.sample_table().to_pylist()
    for slug in store.teachers:
        assert np.array_equal(read[slug], store.valid(slug))
        for tower in ("image", "text"):
            assert np.array_equal(read[f"{slug}/{tower}"], getattr(store, tower)(slug), equal_nan=True)
    assert np.array_equal(read["beta/text"], written["beta/text"])
    assert np.isnan(read["alpha/image"][256:]).all()


def test_the_same_reader_reads_a_store_that_grew(tmp_path: Path) -> None:
    old, written = make_store(tmp_path / "s", 300, [make_card("alpha", 8)])
    other = CorpusRecord(kind="test", location="there", root="/else", rows=7, labels=("organ",), digest="e")
    index = make_index(7).rename_columns({"site": "organ"})
    index = index.set_column(0, index.schema.field(0), pa.array(range(512, 519)))
    made = append_rows(old, other, index)
    features = ShardFeatures(*[np.ones((7, 8), np.float16)] * 2, np.full(7, 3, np.uint8))
    write_shard(made, make_card("alpha", 8), 2, features, read_part(tmp_path / "s", 2)[1])
    read, store = read_store(tmp_path / "s"), FeatureStore.open(tmp_path / "s")
    assert np.array_equal(read["alpha/image"], store.image("alpha"), equal_nan=True)
    assert np.array_equal(read["alpha/image"][:300], written["alpha/image"])
    assert np.array_equal(read["alpha"], store.valid("alpha"))
    # The keys k0 to k6 are there twice now, which is all that is wrong.
    assert [problem[:36] for problem in store.verify(deep=True).problems] == ["samples: 7 keys name more than one r"]


def test_crc32c_of_the_document_is_that_of_the_rfc() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(
    ("data_type", "shape", "chunks"),
    [("float16", (9, 4), (8, 4)), ("float32", (9,), (8,)), ("int8", (9, 4), (8, 4)), ("uint8", (9,), (8,))],
)
def test_array_documents_are_those_of_zarr(
    tmp_path: Path, data_type: str, shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    zarr.create_array(
        tmp_path / "a",
        shape=shape,
        chunks=chunks,
        dtype=data_type,
        fill_value=0 if "int8" in data_type else np.nan,
        serializer=zarr.codecs.BytesCodec() if "int8" in data_type else zarr.codecs.BytesCodec(endian="little"),
        compressors=zarr.codecs.Crc32cCodec(),
    )
    assert json.loads((tmp_path / "a/zarr.json").read_text()) == array_document(shape, chunks, data_type)


def test_the_document_names_every_member_of_a_card() -> None:
    section = DOCUMENT.read_text("utf-8").split("## 6.")[1].split("## 7.")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", section))
    assert {*TeacherCard.model_fields, *TeacherCard.model_fields["preprocessing"].annotation.model_fields} <= named


@pytest.mark.parametrize("name", ["format_reader", "format_writer"])
def test_the_independent_ones_import_nothing_of_ours(name: str) -> None:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text("utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    standard = {"__future__", "hashlib", "json", "math", "pathlib", "struct", "typing"}
    assert modules <= standard | {"numpy", "pyarrow", "pyarrow.parquet", "format_reader"}


def test_a_store_written_from_the_document_is_sound_to_us_and_to_zarr(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = {}
    for slug, dim in (("one", 8), ("two", 3)):
        image, text = rng.normal(size=(2, 300, dim)).astype(np.float16)
        features[slug] = (image, text, rng.random((300, 2)) < 0.8)
    write_store(tmp_path / "s", [f"caption {row}" for row in range(300)], features)
    store = FeatureStore.open(tmp_path / "s")
    report = store.verify(deep=True)
    assert (report.problems, report.orphans, report.entries) == ((), (), 4)
    assert store.sample_table(["caption"])["caption"].to_pylist()[299] == "caption 299"
    read = read_store(tmp_path / "s")
    for slug, (image, text, sound) in features.items():
        for bit, (tower, values) in enumerate((("image", image), ("text", text))):
            expected = np.where(sound[:, bit, None], values, np.float16(np.nan))
            found = getattr(store, tower)(slug)
            assert np.array_equal(found, expected, equal_nan=True)
            assert np.array_equal(zarr.open_array(tmp_path / f"s/teachers/{slug}/{tower}")[:], found, equal_nan=True)
            assert np.array_equal(read[f"{slug}/{tower}"], found, equal_nan=True)
        assert np.array_equal(store.valid(slug), sound @ np.array([1, 2]))
    # Our writer goes on where the other one was: a teacher is added, and a shard is made again to the same bytes.
    other = make_card("ours", 4)
    add_teacher(store, other)
    part = ShardFeatures(*[np.ones((256, 4), np.float16)] * 2, np.full(256, 3, np.uint8))
    write_shard(store, other, 0, part, read_part(tmp_path / "s", 0)[1])
    chunk = tmp_path / "s/teachers/one/image/c/1/0"
    entry = tmp_path / "s/ledger/00001.one.json"
    before = chunk.read_bytes(), json.loads(entry.read_text())
    image, text, sound = (values[256:] for values in features["one"])
    again = ShardFeatures(image, text, (sound @ np.array([1, 2])).astype(np.uint8))
    write_shard(store, store.card("one"), 1, again, read_part(tmp_path / "s", 1)[1])
    assert (chunk.read_bytes(), json.loads(entry.read_text())) == before
    assert FeatureStore.open(tmp_path / "s").verify(deep=True).sound


def test_the_same_reader_reads_inputs_and_selections(tmp_path: Path) -> None:
    cards = [make_card("alpha", 8), make_card("beta", 4)]
    store, _ = make_store(tmp_path / "s", 300, cards)
    rows, _ = read_part(tmp_path / "s", 1)
    jpegs = [None if row % 7 == 0 else b"jpeg %d" % row for row in rows["row"].to_pylist()]
    columns = {"row": rows["row"], "image_sha256": rows["image_sha256"], "jpeg": pa.array(jpegs, pa.large_binary())}
    write_inputs(tmp_path / "s", 1, 32, pa.table(columns))
    read, ours = read_inputs(tmp_path / "s"), Inputs(store)
    assert read == dict(zip(range(256, 300), jpegs, strict=True))
    assert [None if (found := ours.jpeg(row)) is None else bytes(found) for row in read] == jpegs
    kept = np.random.default_rng(0).random((300, 2)) < 0.5
    make_selection(store, "half", kept, cards)
    teachers, pairs = read_selection(tmp_path / "s", "half")
    assert teachers == {card.slug: card.digest for card in cards}
    assert np.array_equal(pairs, kept)
