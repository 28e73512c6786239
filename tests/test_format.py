"""docs/format.md is enough: a reader by its rules, with nothing of ours, gives what was written."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from tiny_store import make_card, make_index, make_store

from mmkd.store import FeatureStore
from mmkd.store.append import append_rows
from mmkd.store.card import TeacherCard
from mmkd.store.hierarchy import array_document
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part
from mmkd.store.writer import ShardFeatures, write_shard

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "format.md"


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, from RFC 3720: reflected polynomial 0x82F63B78."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    steps, crc = table.tolist(), 0xFFFFFFFF
    for byte in data:
        crc = steps[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def canonical(content: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of section 3."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def group(path: Path) -> dict[str, Any]:
    """`attributes.mmkd` of a group whose seal is whole."""
    document = json.loads(path.read_text("utf-8"))
    assert (document["zarr_format"], document["node_type"]) == (3, "group")
    content: dict[str, Any] = document["attributes"]["mmkd"]
    seal = content.pop("sha256")
    assert seal == canonical(content)
    return content


def chunk(path: Path, dtype: str, shape: tuple[int, ...], crc: str) -> np.ndarray:
    """Section 7."""
    data = path.read_bytes()
    body = data[:-4]
    assert len(body) == math.prod(shape) * np.dtype(dtype).itemsize
    assert struct.unpack("<I", data[-4:])[0] == crc32c(body) == int(crc, 16)
    return np.frombuffer(body, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)


def read_store(root: Path) -> dict[str, Any]:
    """Features keyed `slug/tower`, `valid` bits keyed by slug, and the rows under ''."""
    record = group(root / "zarr.json")
    assert record["format"] == 1
    n, r = record["rows"], record["rows_per_shard"]
    out: dict[str, Any] = {"": []}
    parts = [root / f"samples/{s:05d}.parquet" for s in range(-(-n // r))]
    for part in parts:
        out[""] += pq.read_table(part).to_pylist()
    # Section 4.1: each corpus from a shard boundary on; rows of no corpus are absent.
    inputs, end = [], 0
    for corpus in (record["corpus"], *record.get("appended", ())):
        start = -(-end // r) * r
        end = start + corpus["rows"]
        inputs += range(start, end)
    assert end == n
    assert [row["row"] for row in out[""]] == inputs
    names = ("weights_sha256", "preprocessing", "tokenizer_sha256", "context_length")
    names += ("dim", "encoding", "loader", "normalised")
    for folder in sorted((root / "teachers").iterdir()):
        if not folder.is_dir():
            continue
        card = group(folder / "zarr.json")
        assert card["slug"] == folder.name
        assert card["digest"] == canonical({name: card[name] for name in names})[:16]
        d, encoding = card["dim"], card["encoding"]
        towers = {tower: np.full((len(parts) * r, d), np.nan, encoding) for tower in ("image", "text")}
        valid = np.zeros(len(parts) * r, np.uint8)
        for s, part in enumerate(parts):
            path = root / f"ledger/{s:05d}.{folder.name}.json"
            if not path.is_file():
                continue
            entry = json.loads(path.read_text())
            assert (entry["shard"], entry["teacher"], entry["teacher_digest"]) == (s, folder.name, card["digest"])
            assert entry["samples_sha256"] == hashlib.sha256(part.read_bytes()).hexdigest()
            assert entry["rows"] == sum(s * r <= row < (s + 1) * r for row in inputs)
            rows = slice(s * r, (s + 1) * r)
            valid[rows] = chunk(folder / f"valid/c/{s}", "uint8", (r,), entry["valid_crc32c"])
            for bit, (tower, values) in enumerate(towers.items()):
                values[rows] = chunk(folder / f"{tower}/c/{s}/0", encoding, (r, d), entry[f"{tower}_crc32c"])
                sound = (valid[rows] >> bit & 1).astype(bool)
                assert entry[f"{tower}_rows"] == sound.sum()
                assert np.isnan(values[rows][~sound]).all()
        out |= {f"{folder.name}/{tower}": values[:n] for tower, values in towers.items()} | {folder.name: valid[:n]}
    return out


def test_a_reader_written_from_the_document_reads_a_store(tmp_path: Path) -> None:
    cards = [make_card("alpha", 8), make_card("beta", 5).model_copy(update={"encoding": "float32"})]
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
    record, written = make_store(tmp_path / "s", 300, [make_card("alpha", 8)])
    other = CorpusRecord(kind="test", location="there", root="/else", rows=7, labels=("organ",), digest="e")
    index = make_index(7).rename_columns({"site": "organ"})
    index = index.set_column(0, index.schema.field(0), pa.array(range(512, 519)))
    longer = append_rows(tmp_path / "s", record, other, index)
    features = ShardFeatures(*[np.ones((7, 8), np.float16)] * 2, np.full(7, 3, np.uint8))
    write_shard(tmp_path / "s", longer, make_card("alpha", 8), 2, features, read_part(tmp_path / "s", 2)[1])
    read, store = read_store(tmp_path / "s"), FeatureStore.open(tmp_path / "s")
    assert np.array_equal(read["alpha/image"], store.image("alpha"), equal_nan=True)
    assert np.array_equal(read["alpha/image"][:300], written["alpha/image"])
    assert np.array_equal(read["alpha"], store.valid("alpha"))
    # The keys k0 to k6 are there twice now, which is all that is wrong.
    assert [problem[:36] for problem in store.verify(deep=True).problems] == ["samples: 7 keys name more than one r"]


def test_crc32c_of_the_document_is_that_of_the_rfc() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(("data_type", "shape", "chunks"), [("float16", (9, 4), (8, 4)), ("uint8", (9,), (8,))])
def test_array_documents_are_those_of_zarr(
    tmp_path: Path, data_type: str, shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    zarr.create_array(
        tmp_path / "a",
        shape=shape,
        chunks=chunks,
        dtype=data_type,
        fill_value=0 if data_type == "uint8" else np.nan,
        serializer=zarr.codecs.BytesCodec() if data_type == "uint8" else zarr.codecs.BytesCodec(endian="little"),
        compressors=zarr.codecs.Crc32cCodec(),
    )
    assert json.loads((tmp_path / "a/zarr.json").read_text()) == array_document(shape, chunks, data_type)


def test_the_document_names_every_member_of_a_card() -> None:
    section = DOCUMENT.read_text("utf-8").split("## 6.")[1].split("## 7.")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", section))
    assert {*TeacherCard.model_fields, *TeacherCard.model_fields["preprocessing"].annotation.model_fields} <= named
