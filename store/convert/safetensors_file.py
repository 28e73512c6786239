"""Features as safetensors files, one for each shard and teacher. Layout: huggingface/safetensors, README "Format":
eight bytes of header length, a JSON header, the tensors' bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.files import write_atomically
from mmkd.store.array import consecutive
from mmkd.store.reader import FeatureStore
from mmkd.store.writer import iter_shards

_TYPES = {"float16": "F16", "float32": "F32", "uint8": "U8", "int64": "I64"}


def encode(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file; its body starts at a multiple of eight."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": _TYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    bodies = (np.ascontiguousarray(v, dtype=v.dtype.newbyteorder("<")).tobytes() for v in tensors.values())
    return struct.pack("<Q", len(text)) + text + b"".join(bodies)


def export_safetensors(store: FeatureStore, out: Path) -> int:
    """Write `OUT/<slug>/sssss.safetensors` with `row`, `image`, `text` and `valid`; returns the files written."""
    for slug, card in store.teachers.items():
        valid = store.valid(slug)
        for shard, span in enumerate(iter_shards(store.record)):
            rows = slice(span.start, span.stop)
            tensors = {
                "row": np.arange(span.start, span.stop),
                "image": consecutive(store.image(slug), rows),
                "text": consecutive(store.text(slug), rows),
                "valid": valid[rows],
            }
            metadata = {"teacher": slug, "digest": card.digest, "card": card.model_dump_json()}
            write_atomically(out / slug / f"{shard:05d}.safetensors", encode(tensors, metadata))
    return store.shards * len(store.teachers)
