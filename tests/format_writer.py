"""A writer of stores from docs/format.md alone: `json`, `hashlib`, NumPy and PyArrow, nothing of ours.

One corpus without labels, float16 teachers. What it writes must be a sound store to every reader.
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
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0 if data_type == "uint8" else "NaN",
        "codecs": [serializer, {"name": "crc32c"}],
    }
    return json.dumps(document).encode()


def chunk(values: np.ndarray, fill: float) -> tuple[bytes, str]:
    """Section 7: full size, then the checksum."""
    full = np.full((ROWS_PER_SHARD, *values.shape[1:]), fill, values.dtype)
    full[: len(values)] = values
    crc = crc32c(full.tobytes())
    return full.tobytes() + crc.to_bytes(4, "little"), f"{crc:08x}"


def card(slug: str, dim: int) -> dict[str, Any]:
    """Section 6."""
    look = {"image_size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
    look |= {"resize_mode": "shortest", "fill": 0, "color": "RGB"}
    content = {"slug": slug, "source": "elsewhere", "revision": "", "weights_sha256": "w", "preprocessing": look}
    content |= {"tokenizer_sha256": "t", "context_length": 16, "dim": dim, "encoding": "float16", "loader": "other"}
    content |= {"normalized": False, "logit_scale": None, "licence": "MIT", "versions": {}, "encoding_error": None}
    members = ("weights_sha256", "preprocessing", "tokenizer_sha256", "context_length")
    members += ("dim", "encoding", "loader", "normalized")
    return content | {"digest": canonical({name: content[name] for name in members})[:16]}


def write_store(
    root: Path, captions: list[str], features: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> None:
    """A store of rows that have a caption and no image file.

    Args:
        root: a new folder.
        captions: one a row.
        features: slug to image and text, float16 (N, D), and bool (N, 2): which of the two are sound.
    """
    n, r = len(captions), ROWS_PER_SHARD
    shards = [range(start, min(start + r, n)) for start in range(0, n, r)]
    parts = []
    for s, rows in enumerate(shards):
        columns: dict[str, Any] = {name: [None] * len(rows) for name in COLUMNS.names}
        columns |= {"row": list(rows), "key": [f"r{row}" for row in rows], "status": ["ok"] * len(rows)}
        columns |= {"caption": [captions[row] for row in rows]}
        path = root / f"samples/{s:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns, schema=COLUMNS), path, write_page_checksum=True)
        parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    corpus = {"kind": "other", "location": "-", "root": "/", "rows": n, "labels": [], "digest": "d"}
    record = {"format": 1, "rows": n, "rows_per_shard": r, "corpus": corpus, "created": "2026-01-02T03:04:05+00:00"}
    put(root / "zarr.json", group(record | {"versions": {"other": "1"}}))
    put(root / "teachers/zarr.json", group())
    for slug, (image, text, sound) in features.items():
        about = card(slug, image.shape[1])
        folder = root / f"teachers/{slug}"
        for tower in ("image", "text"):
            put(folder / tower / "zarr.json", array([n, about["dim"]], [r, about["dim"]], "float16"))
        put(folder / "valid/zarr.json", array([n], [r], "uint8"))
        put(folder / "zarr.json", group(about))
        for s, rows in enumerate(shards):
            here = slice(rows.start, rows.stop)
            entry = {"shard": s, "teacher": slug, "teacher_digest": about["digest"], "rows": len(rows)}
            entry |= {"image_rows": int(sound[here, 0].sum()), "text_rows": int(sound[here, 1].sum())}
            for bit, (tower, values) in enumerate((("image", image), ("text", text))):
                stored = np.where(sound[here, bit, None], values[here], np.float16(np.nan))
                data, entry[f"{tower}_crc32c"] = chunk(stored, np.nan)
                put(folder / f"{tower}/c/{s}/0", data)
            bits = (sound[here] @ np.array([1, 2])).astype(np.uint8)
            data, entry["valid_crc32c"] = chunk(bits, 0)
            put(folder / f"valid/c/{s}", data)
            entry["samples_sha256"] = parts[s]
            put(root / f"ledger/{s:05d}.{slug}.json", (json.dumps(entry, indent=1) + "\n").encode())
