"""A writer of stores from docs/format.md alone: `json`, `hashlib`, NumPy and PyArrow, nothing of ours.

Corpora without labels, float16 teachers. What it writes must be a sound store to every reader.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from format_reader import canonical, crc32c

ROWS_PER_SHARD = 256
SHARDS_PER_PACK = 2
COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("caption", "modality", "uri")),
        *(pa.field(name, pa.int64()) for name in ("offset", "length")),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("width", "height")),
        pa.field("image_sha256", pa.string()),
        pa.field("image_rows", pa.list_(pa.int64())),
        pa.field("view_number", pa.int32()),
        pa.field("caption_kind", pa.string()),
    ]
)
"""Section 5."""


def put(path: Path, data: bytes) -> None:
    """A file and its folders. (Renaming into place matters to others that read meanwhile; here is nobody.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def group(content: dict[str, Any] | None = None) -> bytes:
    """Section 3: a group, its content sealed."""
    attributes = {} if content is None else {"mmkd": content | {"sha256": canonical(content)}}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def array(shape: list[int], chunks: list[int], data_type: str) -> bytes:
    """Section 3: an array's document."""
    serializer: dict[str, Any] = {"name": "bytes"}
    if data_type != "uint8":
        serializer["configuration"] = {"endian": "little"}
    packs = {"chunk_shape": chunks, "codecs": [serializer], "index_location": "end"}
    packs["index_codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARDS_PER_PACK * chunks[0], *chunks[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0 if data_type == "uint8" else "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": packs}],
        "dimension_names": ["row", "feature"][: len(shape)],
    }
    return json.dumps(document).encode()


def chunk(values: np.ndarray, fill: float) -> tuple[bytes, str]:
    """Section 7: full size, then the checksum."""
    full = np.full((ROWS_PER_SHARD, *values.shape[1:]), fill, values.dtype)
    full[: len(values)] = values
    crc = crc32c(full.tobytes())
    return full.tobytes() + crc.to_bytes(4, "little"), f"{crc:08x}"


def pack(chunks: dict[int, bytes], number: int) -> bytes:
    """Section 7: bodies of a pack one after the other, then its index."""
    bodies, index = b"", b""
    for s in range(number * SHARDS_PER_PACK, (number + 1) * SHARDS_PER_PACK):
        body = chunks.get(s, b"")[:-4]
        index += np.array([len(bodies), len(body)] if body else [2**64 - 1] * 2, "<u8").tobytes()
        bodies += body
    return bodies + index + crc32c(index).to_bytes(4, "little")


def put_chunks(array: Path, chunks: dict[int, bytes], packed: bool, tail: str) -> None:
    """The chunks of an array: in packs, or, before they are packed, one by one."""
    if not packed:
        for s, data in chunks.items():
            put(array / f"loose/{s:05d}", data)
        return
    for number in sorted({s // SHARDS_PER_PACK for s in chunks}):
        put(array / f"c/{number}{tail}", pack(chunks, number))


def put_ledger(root: Path, entries: list[dict[str, Any]], folded: bool) -> None:
    """Section 8: entries in one file, or each in a file of its own."""
    entries = sorted(entries, key=lambda entry: (entry["shard"], entry["teacher"]))
    if folded:
        lines = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries).encode()
        end = {"entries": len(entries), "sha256": hashlib.sha256(lines).hexdigest()}
        put(root / "ledger/folded/00000.jsonl", lines + json.dumps(end).encode() + b"\n")
        return
    for entry in entries:
        name = f"{entry['shard']:05d}.{entry['teacher']}.json"
        put(root / "ledger" / name, (json.dumps(entry, indent=1) + "\n").encode())


def card(slug: str, dim: int, towers: list[str]) -> dict[str, Any]:
    """Section 6."""
    look = {"image_size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
    look |= {"resize_mode": "shortest", "fill": 0, "resize": 0, "color": "RGB"}
    content: dict[str, Any] = {"slug": slug, "source": "elsewhere", "revision": "", "weights_sha256": "w"}
    content |= {"towers": towers, "preprocessing": look if "image" in towers else None}
    content |= {"tokenizer_sha256": "t", "context_length": 16} if "text" in towers else {}
    content = {"tokenizer_sha256": "", "context_length": 0} | content
    content |= {"dim": dim, "encoding": "float16", "loader": "other", "normalized": False, "logit_scale": None}
    content |= {"license": "MIT", "versions": {}, "encoding_error": None}
    members = ("weights_sha256", "preprocessing", "tokenizer_sha256", "context_length")
    members += ("towers", "dim", "encoding", "loader", "normalized")
    return content | {"digest": canonical({name: content[name] for name in members})[:16]}


def put_teacher(
    root: Path,
    slug: str,
    features: tuple[np.ndarray | None, np.ndarray | None, np.ndarray],
    shards: list[tuple[range, list[str], list[Any]]],
    parts: list[str],
    packed: bool,
) -> list[dict[str, Any]]:
    """One teacher's card, arrays and chunks; its ledger entries. shards: rows, towers and links of each; parts: SHA-256
    of their samples."""
    r, n, entries = ROWS_PER_SHARD, shards[-1][0].stop, []
    image, text, sound = features
    given = {tower: values for tower, values in (("image", image), ("text", text)) if values is not None}
    about = card(slug, next(iter(given.values())).shape[1], list(given))
    folder = root / f"teachers/{slug}"
    for tower in given:
        put(folder / tower / "zarr.json", array([n, about["dim"]], [r, about["dim"]], "float16"))
    put(folder / "valid/zarr.json", array([n], [r], "uint8"))
    put(folder / "zarr.json", group(about))
    chunks: dict[str, dict[int, bytes]] = {name: {} for name in (*given, "valid")}
    for s, (rows, towers, _) in enumerate(shards):
        asked = {tower: values for tower, values in given.items() if tower in towers}
        if not asked:
            continue
        here = slice(rows.start, rows.stop)
        entry = {"shard": s, "teacher": slug, "teacher_digest": about["digest"], "rows": len(rows)}
        bits = np.zeros(len(rows), np.uint8)
        for tower, values in asked.items():
            bit = ("image", "text").index(tower)
            entry[f"{tower}_rows"] = int(sound[here, bit].sum())
            bits |= (sound[here, bit] << bit).astype(np.uint8)
            stored = np.where(sound[here, bit, None], values[here], np.float16(np.nan))
            chunks[tower][s], entry[f"{tower}_crc32c"] = chunk(stored, np.nan)
        chunks["valid"][s], entry["valid_crc32c"] = chunk(bits, 0)
        entry["samples_sha256"] = parts[s]
        order = [f"{t}_{what}" for what in ("rows", "crc32c") for t in asked]
        order = ["shard", "teacher", "teacher_digest", "rows", *order, "valid_crc32c", "samples_sha256"]
        entries.append({name: entry[name] for name in order})
    for name, some in chunks.items():
        put_chunks(folder / name, some, packed, "" if name == "valid" else "/0")
    return entries


def write_store(
    root: Path,
    captions: list[str],
    features: dict[str, tuple[np.ndarray | None, np.ndarray | None, np.ndarray]],
    further: list[tuple[str, list[list[int]]]] | None = None,
    packed: bool = True,
) -> None:
    """A store of rows that have a caption and no image file, then of views or further captions of them.

    Args:
        root: a new folder.
        captions: one a row.
        features: slug to image and text, float16 (N, D) or None for a tower that there is not, and bool (N, 2): which
            of the two are sound.
        further: tower and rows that each row is a view or a caption of; each entry begins at the next shard boundary.
        packed: chunks lie in packs and the entries are folded; else as an extraction leaves them before its end.
    """
    r = ROWS_PER_SHARD
    corpora, shards, end = [], [], 0
    for towers, links in [(["image", "text"], [None] * len(captions)), *(([t], links) for t, links in further or [])]:
        start = -(-end // r) * r
        end = start + len(links)
        about = {"kind": "other", "location": "-", "root": "/", "rows": len(links), "labels": [], "towers": towers}
        corpora.append(about | {"recipe": {"seed": 1} if towers == ["image"] else None, "digest": f"d{start}"})
        shards += [(range(s, min(s + r, end)), towers, links[s - start : s - start + r]) for s in range(start, end, r)]
    n, parts = end, []
    for s, (rows, towers, links) in enumerate(shards):
        columns: dict[str, Any] = {name: [None] * len(rows) for name in COLUMNS.names}
        columns |= {"row": list(rows), "key": [f"r{row}" for row in rows], "status": ["ok"] * len(rows)}
        texts = [captions[row] if row < len(captions) else f"another {row}" for row in rows]
        columns |= {"caption": texts} if "text" in towers else {"view_number": [1] * len(rows)}
        columns |= {"image_rows": links, "caption_kind": ["synthetic" if towers == ["text"] else None] * len(rows)}
        path = root / f"samples/{s:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns, schema=COLUMNS), path, write_page_checksum=True)
        parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    record = {"format": 2, "rows": n, "rows_per_shard": r, "shards_per_pack": SHARDS_PER_PACK}
    record |= {"corpus": corpora[0], "appended": corpora[1:]}
    put(root / "zarr.json", group(record | {"created": "2026-01-02T03:04:05+00:00", "versions": {"other": "1"}}))
    put(root / "teachers/zarr.json", group())
    entries: list[dict[str, Any]] = []
    for slug, given in features.items():
        entries += put_teacher(root, slug, given, shards, parts, packed)
    put_ledger(root, entries, packed)
