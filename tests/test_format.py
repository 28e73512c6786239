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

from mmkd.store import FeatureStore, UserError
from mmkd.store.card import Preprocessing, TeacherCard
from mmkd.store.convert.rows import StoreRows
from mmkd.store.fold import fold
from mmkd.store.hierarchy import array_document
from mmkd.store.inputs import Inputs, write_inputs
from mmkd.store.ledger import read_ledger, remove_entry
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part
from mmkd.store.writer import ShardFeatures, add_teacher, append_rows, write_shard

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "format.md"


@pytest.mark.parametrize("folded", [False, True])
def test_a_reader_written_from_the_document_reads_a_store(tmp_path: Path, folded: bool) -> None:
    cards = [make_card("alpha", 8), make_card("beta", 5).with_encoding("float32")]
    cards.append(make_card("gamma", 6).with_encoding("int8"))
    made, written = make_store(tmp_path / "s", 300, cards)
    (tmp_path / "s/ledger/00001.alpha.json").unlink()
    if folded:
        assert fold(made).packs == 3 + 3 + 5
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
    [("float16", (40, 4), (8, 4)), ("float32", (40,), (8,)), ("int8", (40, 4), (8, 4)), ("uint8", (40,), (8,))],
)
@pytest.mark.parametrize("packed", [False, True])
def test_array_documents_are_those_of_zarr(
    tmp_path: Path, data_type: str, shape: tuple[int, ...], chunks: tuple[int, ...], packed: bool
) -> None:
    pack = (4 * chunks[0], *chunks[1:])
    zarr.create_array(
        tmp_path / "a",
        shape=shape,
        chunks=chunks,
        shards=pack if packed else None,
        dtype=data_type,
        fill_value=0 if "int8" in data_type else np.nan,
        serializer=zarr.codecs.BytesCodec() if "int8" in data_type else zarr.codecs.BytesCodec(endian="little"),
        compressors=None if packed else zarr.codecs.Crc32cCodec(),
        dimension_names=["row", "feature"][: len(shape)],
    )
    expected = array_document(shape, pack if packed else chunks, data_type, inner=chunks if packed else None)
    assert json.loads((tmp_path / "a/zarr.json").read_text()) == expected


def test_the_document_names_every_member_of_a_card() -> None:
    section = DOCUMENT.read_text("utf-8").split("## 6.")[1].split("## 7.")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", section))
    assert {*TeacherCard.model_fields, *Preprocessing.model_fields} <= named


@pytest.mark.parametrize("name", ["format_reader", "format_writer"])
def test_the_independent_ones_import_nothing_of_ours(name: str) -> None:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text("utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    standard = {
        "__future__",
        "collections",
        "functools",
        "hashlib",
        "itertools",
        "json",
        "math",
        "pathlib",
        "struct",
    } | {"typing"}
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
    pack = tmp_path / "s/teachers/one/image/c/0/0"
    before = {place: entry for place, entry in read_ledger(tmp_path / "s").items() if place[1] != "ours"}
    packed = pack.read_bytes()
    remove_entry(tmp_path / "s", 1, "one")
    assert np.isnan(FeatureStore.open(tmp_path / "s").image("one")[256:]).all()
    image, text, sound = (values[256:] for values in features["one"])
    again = ShardFeatures(image, text, (sound @ np.array([1, 2])).astype(np.uint8))
    write_shard(store, store.card("one"), 1, again, read_part(tmp_path / "s", 1)[1])
    assert (tmp_path / "s/teachers/one/image/loose/00001").is_file()
    assert {place: entry for place, entry in read_ledger(tmp_path / "s").items() if place[1] != "ours"} == before
    fold(store)
    assert pack.read_bytes() == packed
    assert FeatureStore.open(tmp_path / "s").verify(deep=True).sound


def test_towers_that_are_not_there_and_rows_of_their_own_kind_take_no_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows, n = 300, 512 + 256 + 20  # then 256 views of the first rows, then 20 captions, each of several images
    image, text = rng.normal(size=(2, n, 8)).astype(np.float16)
    sound = np.ones((n, 2), bool)
    further = [("image", [[row] for row in range(256)]), ("text", [[row, row + 1, 299] for row in range(20)])]
    features = {"both": (image, text, sound), "seer": (image, None, sound), "reader": (None, text, sound)}
    write_store(tmp_path / "s", [f"caption {row}" for row in range(rows)], features, further)
    store = FeatureStore.open(tmp_path / "s")
    report = store.verify(deep=True)
    assert (report.problems, report.orphans, report.entries) == ((), (), 4 + 3 + 3)
    assert {slug: card.towers for slug, card in store.teachers.items()} == {
        "both": ("image", "text"), "reader": ("text",), "seer": ("image",),
    }  # fmt: skip
    asked = {"image": np.r_[0:rows, 512:768], "text": np.r_[0:rows, 768:n]}
    read = read_store(tmp_path / "s")
    for slug, (own_image, own_text, _) in features.items():
        for tower, values in (("image", own_image), ("text", own_text)):
            if values is None:
                with pytest.raises(UserError, match=f"teacher {slug} has no {tower} tower"):
                    store.features(slug, tower)
                continue
            expected = np.full_like(values, np.nan)
            expected[asked[tower]] = values[asked[tower]]
            assert np.array_equal(store.features(slug, tower), expected, equal_nan=True)
            assert np.array_equal(read[f"{slug}/{tower}"], expected, equal_nan=True)
            stored = zarr.open_array(tmp_path / f"s/teachers/{slug}/{tower}")[:]
            assert np.array_equal(stored, expected, equal_nan=True)
        assert np.array_equal(store.valid(slug), read[slug])
    assert store.available().sum(axis=0).tolist() == [rows, rows + 20, rows + 256]  # both, reader, seer
    links = store.sample_table(["image_rows", "view_number", "caption_kind"]).to_pylist()
    assert links[0] == {"image_rows": None, "view_number": None, "caption_kind": None}
    assert links[512 + 5] == {"image_rows": [5], "view_number": 1, "caption_kind": None}
    assert links[768 + 5] == {"image_rows": [5, 6, 299], "view_number": None, "caption_kind": "synthetic"}
    assert store.summary().complete
    with pytest.raises(UserError, match=r"row 513 of .* is a view or a caption of other rows"):
        StoreRows([(store, np.array([3, 513]))])
    assert [path.name for path in (tmp_path / "s/teachers/both/text/c").iterdir()] == ["0", "1"]  # shards 0, 1, and 3
    pack = tmp_path / "s/teachers/both/text/c/1/0"
    assert pack.stat().st_size == 256 * 8 * 2 + 2 * 16 + 4
    sizes = {slug: sum(p.stat().st_size for p in (tmp_path / f"s/teachers/{slug}").rglob("*")) for slug in features}
    assert sizes["seer"] < 0.75 * sizes["both"]


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
