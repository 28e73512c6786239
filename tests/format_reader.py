"""A reader of stores written from docs/format.md alone: `json`, `struct`, `hashlib`, NumPy, PyArrow, nothing of ours.

It checks what section 10 says that a reader must check, and whatever else the document promises.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from functools import cache
from itertools import accumulate
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


def chunk(array: Path, shard: int, packed: int, dtype: str, shape: tuple[int, ...], crc: str) -> np.ndarray:
    """Section 7: the loose chunk of a shard, else that of the pack."""
    loose, size = array / f"loose/{shard:05d}", math.prod(shape) * np.dtype(dtype).itemsize
    if loose.is_file():
        data = loose.read_bytes()
        body = data[:-4]
        assert struct.unpack("<I", data[-4:])[0] == int(crc, 16)
    else:
        pack = (array / f"c/{shard // packed}{'/0' if len(shape) == 2 else ''}").read_bytes()
        index = pack[-16 * packed - 4 : -4]
        assert struct.unpack("<I", pack[-4:])[0] == crc32c(index)
        offset, length = struct.unpack_from("<QQ", index, 16 * (shard % packed))
        assert offset % size == 0
        assert length == size
        body = pack[offset : offset + length]
    assert len(body) == size
    assert crc32c(body) == int(crc, 16)
    return np.frombuffer(body, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)


def ledger(root: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Section 8: entries by shard and teacher, loose and folded."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for path in sorted((root / "ledger/folded").glob("*.jsonl")):
        *lines, end = path.read_bytes().splitlines(keepends=True)
        assert json.loads(end) == {"entries": len(lines), "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}
        entries = [json.loads(line) for line in lines]
        places = [(entry["shard"], entry["teacher"]) for entry in entries]
        assert places == sorted(set(places))
        assert {shard // 1000 for shard, _ in places} == {int(path.stem)}
        found |= dict(zip(places, entries, strict=True))
    for path in (root / "ledger").glob("*.json"):
        entry = json.loads(path.read_text())
        assert path.name == f"{entry['shard']:05d}.{entry['teacher']}.json"
        assert found.setdefault((entry["shard"], entry["teacher"]), entry) == entry
    return found


def grid(record: dict[str, Any]) -> tuple[list[int], dict[int, list[str]]]:
    """Section 4.1: each corpus from a shard boundary on; rows of no corpus are absent. Returns the rows of inputs, and
    the towers that each shard is asked for."""
    inputs: list[int] = []
    end, r, asked = 0, record["rows_per_shard"], {}
    for corpus in (record["corpus"], *record.get("appended", ())):
        start = -(-end // r) * r
        end = start + corpus["rows"]
        inputs += range(start, end)
        asked |= dict.fromkeys(range(start // r, -(-end // r)), corpus["towers"])
    assert end == record["rows"]
    return inputs, asked


def sample_part(root: Path, shard: int) -> bytes:
    """Sections 5 and 5.1: a part from its own file, or else from the folded one, which is one Parquet file of all."""
    if (path := root / f"samples/{shard:05d}.parquet").exists():
        return path.read_bytes()
    path = root / f"samples/folded/{shard // 64:05d}.parquet"
    start, length = folded_parts(path)[str(shard)]
    return path.read_bytes()[start : start + length]


@cache
def folded_parts(path: Path) -> dict[str, list[int]]:
    """Section 5.1: where the parts lie, after a look at what else the footer says."""
    own = json.loads(pq.read_metadata(path).metadata[b"mmkd"])
    assert list(own["parts"]) == sorted(own["parts"], key=int)
    assert [start for start, _ in own["parts"].values()] == [0, *accumulate(n for _, n in own["parts"].values())][:-1]
    table = pq.read_table(path, columns=["status", "reason"], page_checksum_verification=True)
    for name in ("status", "reason"):
        assert own[name] == Counter(value for value in table[name].to_pylist() if value is not None)
    return own["parts"]  # type: ignore[no-any-return]


def read_store(root: Path) -> dict[str, Any]:
    """Features keyed `slug/tower`, `valid` bits keyed by slug, and the rows under ''."""
    record = group(root / "zarr.json")
    assert record["format"] == 2
    n, r, packed = record["rows"], record["rows_per_shard"], record["shards_per_pack"]
    out: dict[str, Any] = {"": []}
    parts = [sample_part(root, s) for s in range(-(-n // r))]
    for part in parts:
        out[""] += pq.read_table(pa.BufferReader(part)).to_pylist()
    inputs, asked = grid(record)
    entries = ledger(root)
    assert [row["row"] for row in out[""]] == inputs
    names = ("weights_sha256", "preprocessing", "tokenizer_sha256", "context_length")
    names += ("towers", "dim", "encoding", "loader", "normalized")
    for folder in sorted((root / "teachers").iterdir()):
        if not folder.is_dir():
            continue
        card = group(folder / "zarr.json")
        assert card["slug"] == folder.name
        assert card["digest"] == canonical({name: card[name] for name in names})[:16]
        d, encoding = card["dim"], card["encoding"]
        towers = {
            tower: np.full((len(parts) * r, d), np.nan, encoding.replace("int8", "float32")) for tower in card["towers"]
        }
        assert (card["preprocessing"] is not None) == ("image" in towers)
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
            ["valid", *(f"{tower}{part}" for tower in towers for part in ("", "_scale")[: 1 + (encoding == "int8")])]
        )
        valid = np.zeros(len(parts) * r, np.uint8)
        for s, part in enumerate(parts):
            if (entry := entries.get((s, folder.name))) is None:
                continue
            assert (entry["shard"], entry["teacher"], entry["teacher_digest"]) == (s, folder.name, card["digest"])
            assert entry["samples_sha256"] == hashlib.sha256(part).hexdigest()
            assert entry["rows"] == sum(s * r <= row < (s + 1) * r for row in inputs)
            rows = slice(s * r, (s + 1) * r)
            valid[rows] = chunk(folder / "valid", s, packed, "uint8", (r,), entry["valid_crc32c"])
            assert not (valid[rows] & (255 - sum({"image": 1, "text": 2}[tower] for tower in towers))).any()
            for tower, bit in (("image", 0), ("text", 1)):
                if tower not in towers or tower not in asked[s]:
                    assert not any(name.startswith(f"{tower}_") for name in entry)
                    assert not (folder / f"{tower}/loose/{s:05d}").exists()
                    continue
                values = towers[tower]
                stored = chunk(folder / tower, s, packed, encoding, (r, d), entry[f"{tower}_crc32c"])
                assert (f"{tower}_scale_crc32c" in entry) == (f"{tower}_error" in entry) == (encoding == "int8")
                if encoding == "int8":
                    crc = entry[f"{tower}_scale_crc32c"]
                    scale = chunk(folder / f"{tower}_scale", s, packed, "float32", (r,), crc)
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
        part = pq.read_table(pa.BufferReader(sample_part(root, shard)), columns=["row", "image_sha256"])
        assert table["row"].to_pylist() == part["row"].to_pylist()
        assert len(table) == entry["rows"] == entry["images"] + table["jpeg"].null_count
        out |= dict(zip(table["row"].to_pylist(), table["jpeg"].to_pylist(), strict=True))
    return out


def read_selection(root: Path, name: str) -> tuple[dict[str, str], np.ndarray]:
    """Section 12: teachers with their cards' digests, and the pairs, uint8 (N, T')."""
    record = group(root / "zarr.json")
    n, r = record["rows"], record["rows_per_shard"] * record["shards_per_pack"]
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
