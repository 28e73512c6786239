"""An alignment on disk: one safetensors file that holds the maps and the card, and the card once more to read.

Tensors: `<slug>/weight` (D, E), `<slug>/image_bias` (D,), `<slug>/text_bias` (D,), all float32; a teacher without
them is mapped onto itself. Metadata: `mmkd` is the card as JSON, `sha256` the checksum over card and tensors.
`NAME.json` beside `NAME.safetensors` repeats the card, indented, for people; nothing reads it back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from mmkd.base.errors import CorruptStoreError, FormatVersionError, UserError
from mmkd.base.files import write_atomically
from mmkd.distill.alignment.maps import Alignment, AlignmentCard, TeacherMap
from mmkd.store.convert.safetensors_file import encode

FORMAT = 1
_PARTS = ("weight", "image_bias", "text_bias")


def save(alignment: Alignment, path: Path) -> None:
    """Write `path` (`.safetensors`) in one step, and its card beside it as `.json`.

    Raises:
        StoreError: the disk is full or read-only; a file that was there stays.
    """
    tensors: dict[str, torch.Tensor] = {}
    for slug in sorted(alignment.mapped):
        fitted = alignment.teacher_map(slug)
        tensors |= {f"{slug}/{part}": getattr(fitted, part).cpu().contiguous() for part in _PARTS}
    card = alignment.card.model_dump_json()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    write_atomically(path, encode(arrays, {"mmkd": card, "sha256": _checksum(card, tensors)}))
    write_atomically(path.with_suffix(".json"), (alignment.card.model_dump_json(indent=1) + "\n").encode())


def load(path: Path) -> Alignment:
    """Read an alignment; no code in it is ever run.

    Raises:
        UserError: there is no such file, or it is not an alignment.
        FormatVersionError: written by a newer mmkd.
        CorruptStoreError: its bytes are not what was written, or its shapes do not fit its card.
    """
    if not path.is_file():
        raise UserError(f"no alignment at {path}; `mmkd align STORE RUN.yaml` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CorruptStoreError(f"{path} is not a whole safetensors file: {error}; fit the alignment again") from error
    if "mmkd" not in metadata:
        raise UserError(f"{path} is a safetensors file but no alignment; `mmkd align STORE RUN.yaml` writes one")
    card = _read_card(path, metadata["mmkd"])
    if _checksum(metadata["mmkd"], tensors) != metadata.get("sha256"):
        raise CorruptStoreError(f"{path} was changed after it was written: wrong checksum; fit the alignment again")
    maps = {}
    for slug in dict.fromkeys(name.rpartition("/")[0] for name in tensors):
        width = card.widths.get(slug)
        shapes = {"weight": (card.dim, width), "image_bias": (card.dim,), "text_bias": (card.dim,)}
        parts = {part: tensors.get(f"{slug}/{part}") for part in _PARTS}
        for part, tensor in parts.items():
            if tensor is None or tuple(tensor.shape) != shapes[part] or not bool(tensor.isfinite().all()):
                raise CorruptStoreError(
                    f"{path}: {slug}/{part} is not finite of shape {shapes[part]}; fit the alignment again"
                )
        maps[slug] = TeacherMap(**{part: tensor for part, tensor in parts.items() if tensor is not None})
    if card.dim is not None and set(maps) != set(card.teachers):
        raise CorruptStoreError(f"{path} has maps of {sorted(maps)}, its card names {sorted(card.teachers)}")
    return Alignment(card, maps)


def _read_card(path: Path, text: str) -> AlignmentCard:
    try:
        content = json.loads(text)
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise FormatVersionError(
                f"{path} is of alignment format {content.get('format')!r}, this mmkd reads {FORMAT}; install a newer"
            )
        card = AlignmentCard.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptStoreError(f"{path}: card: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path}: its card is not JSON: {error}") from error
    if set(card.teachers) != set(card.widths):
        raise CorruptStoreError(f"{path}: its card gives digests and widths of different teachers")
    return card


def _checksum(card: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 in hex over the card, then name, shape and little-endian bytes of each tensor in order of name."""
    content = hashlib.sha256(card.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.contiguous().numpy().astype(tensor.numpy().dtype.newbyteorder("<"), copy=False).tobytes())
    return content.hexdigest()
