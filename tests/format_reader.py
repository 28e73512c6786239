"""A reader of stores written from docs/format.md alone: `json`, `struct`, `hashlib`, NumPy, PyArrow, nothing of ours.

It checks what section 10 says that a reader must check, and whatever else the document promises.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


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
    names += ("dim", "encoding", "loader", "normalized")
    for folder in sorted((root / "teachers").iterdir()):
        if not folder.is_dir():
            continue
        card = group(folder / "zarr.json")
        assert card["slug"] == folder.name
        assert card["digest"] == canonical({name: card[name] for name in names})[:16]
        d, encoding = card["dim"], card["encoding"]
        towers = {
            tower: np.full((len(parts) * r, d), np.nan, encoding.replace("int8", "float32"))
            for tower in ("image", "text")
        }
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
                stored = chunk(folder / f"{tower}/c/{s}/0", encoding, (r, d), entry[f"{tower}_crc32c"])
                assert (f"{tower}_scale_crc32c" in entry) == (f"{tower}_error" in entry) == (encoding == "int8")
                if encoding == "int8":
                    crc = entry[f"{tower}_scale_crc32c"]
                    scale = chunk(folder / f"{tower}_scale/c/{s}", "float32", (r,), crc)
                    assert not stored[np.isnan(scale)].any()
                    assert (np.abs(stored[np.isfinite(scale)]).max(axis=1) == 127).all()
                    stored = stored * scale[:, None]
                values[rows] = stored
                sound = (valid[rows] >> bit & 1).astype(bool)
                assert entry[f"{tower}_rows"] == sound.sum()
                assert np.isnan(values[rows][~sound]).all()
        out |= {f"{folder.name}/{tower}": values[:n] for tower, values in towers.items()} | {folder.name: valid[:n]}
    return out


def read_inputs(root: Path) -> dict[int, bytes | None]:
    """Section 11: row to JPEG, for the shards that an entry vouches for."""
    out: dict[int, bytes | None] = {}
    for path in sorted((root / "inputs").glob("*.json")):
        entry = json.loads(path.read_text())
        assert entry.pop("sha256") == canonical(entry)
        shard = int(path.stem)
        assert set(entry) == {"shard", "size", "quality", "rows", "images", "bytes", "crc32c"}
        data = (root / f"inputs/{shard:05d}.arrow").read_bytes()
        assert (entry["shard"], entry["bytes"], entry["crc32c"]) == (shard, len(data), f"{crc32c(data):08x}")
        table = pa.ipc.open_file(data).read_all()
        part = pq.read_table(root / f"samples/{shard:05d}.parquet", columns=["row", "image_sha256"])
        assert table["row"].to_pylist() == part["row"].to_pylist()
        assert len(table) == entry["rows"] == entry["images"] + table["jpeg"].null_count
        out |= dict(zip(table["row"].to_pylist(), table["jpeg"].to_pylist(), strict=True))
    return out


def read_selection(root: Path, name: str) -> tuple[dict[str, str], np.ndarray]:
    """Section 12: teachers with their cards' digests, and the pairs, uint8 (N, T')."""
    record = group(root / "zarr.json")
    n, r = record["rows"], record["rows_per_shard"]
    document = json.loads((root / f"selections/{name}/zarr.json").read_text())
    assert (document["zarr_format"], document["node_type"], document["data_type"]) == (3, "array", "uint8")
    card = document["attributes"]["mmkd"]
    assert card.pop("sha256") == canonical(card)
    teachers: dict[str, str] = card["teachers"]
    assert (card["format"], card["rows"]) == (1, n)
    assert document["shape"] == [n, len(teachers)]
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [r, len(teachers)]
    pairs = []
    for s in range(-(-n // r)):
        data = (root / f"selections/{name}/c/{s}/0").read_bytes()
        assert struct.unpack("<I", data[-4:])[0] == crc32c(data[:-4])
        pairs.append(np.frombuffer(data[:-4], np.uint8).reshape(r, len(teachers)))
    values = np.concatenate(pairs)[:n]
    assert card["digest"] == hashlib.sha256(values.tobytes()).hexdigest()
    for slug, digest in teachers.items():
        assert group(root / f"teachers/{slug}/zarr.json")["digest"] == digest
    return teachers, values
