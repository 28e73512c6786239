"""Alignments: one affine map per teacher to a common width, fitted from stored features, in one small file.

Training needs nothing else of this package; the modules beside this one fit alignments and judge them on held-out rows.
Shapes: B rows, E teacher width, D common width. The file is safetensors: `<slug>/weight` (D, E), `<slug>/image_bias`
(D,), `<slug>/text_bias` (D,), all float32; a teacher without them is mapped onto itself. Metadata: `mmkd` is the card
as JSON, `sha256` the checksum over card and tensors. `NAME.json` beside `NAME.safetensors` repeats the card for people.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import nn

from mmkd.base.config import Frozen
from mmkd.base.errors import CorruptStoreError, FormatVersionError, TeacherMismatchError, UserError, faults_as
from mmkd.base.files import write_atomically
from mmkd.store.card import TeacherCard
from mmkd.store.convert.exports import encode_safetensors
from mmkd.store.hierarchy import parse_document
from mmkd.store.layout import TOWERS, Tower

FORMAT = 1
_PARTS = ("weight", "image_bias", "text_bias")


class AlignmentCard(Frozen):
    """Method, settings and training data of an alignment."""

    format: int = FORMAT
    method: str
    """Name of the method that fitted it; `none` maps every teacher onto itself."""
    settings: dict[str, Any]
    """The method's own settings."""
    dim: int | None = Field(gt=0)
    """Common width D; None when every teacher keeps its own (`none`)."""
    unit_input: bool
    """Teacher features are scaled to norm 1 before the map."""
    teachers: dict[str, str]
    """Slug to the digest of the card that the features were made with."""
    widths: dict[str, int]
    """Slug to teacher width E."""
    corpus: str
    """Digest of the corpus whose rows it was fitted on."""
    rows: int = Field(ge=0)
    """Rows that it was fitted on."""
    seed: int = 0
    scores: dict[str, Any] = Field(default_factory=dict)
    """Scores on held-out rows; see `mmkd.distill.alignment.fit`."""


@dataclass(frozen=True)
class TeacherMap:
    """``y = W x + b``: weight float32 (D, E); one bias float32 (D,) for each tower. Image and text share the weight;
    the biases differ when each tower is centered by itself (arXiv 2203.02053)."""

    weight: torch.Tensor
    image_bias: torch.Tensor
    text_bias: torch.Tensor


class Alignment(nn.Module):
    """Maps of all teachers of a store, as buffers that are not trained.

    >>> alignment = load(path).to(device)
    >>> alignment.check(store.teachers)
    >>> alignment("biomedclip", "image", features)      # float (B, E) -> float32 (B, D)
    """

    def __init__(self, card: AlignmentCard, maps: Mapping[str, TeacherMap]) -> None:
        super().__init__()
        self.card = card
        self.slugs = tuple(card.teachers)
        self.mapped = frozenset(maps)
        for slug, fitted in maps.items():
            # By number: a slug may hold a dot, which the name of a buffer must not.
            for name in _PARTS:
                self.register_buffer(f"{name}_{self._index(slug)}", getattr(fitted, name).detach().float())

    def width(self, slug: str) -> int:
        """Width of a teacher's features after the map. Raises UserError if it was not fitted for this teacher."""
        self._index(slug)
        return self.card.dim or self.card.widths[slug]

    def teacher_map(self, slug: str) -> TeacherMap:
        """Return the map of one teacher; the identity where the alignment has none."""
        index = self._index(slug)
        if slug not in self.mapped:
            width = self.card.widths[slug]
            return TeacherMap(torch.eye(width), torch.zeros(width), torch.zeros(width))
        return TeacherMap(*(getattr(self, f"{name}_{index}") for name in _PARTS))

    @torch.no_grad()
    def forward(self, slug: str, tower: Tower, features: torch.Tensor) -> torch.Tensor:
        """Map features of one tower, float (B, E), to the common space: float32 (B, D), without gradients. Raises
        UserError if it was not fitted for this teacher, or its features have another width."""
        index = self._index(slug)
        if features.shape[-1] != self.card.widths[slug] or tower not in TOWERS:
            raise UserError(
                f"features of {slug} ({tower}) have width {features.shape[-1]}, "
                f"the alignment was fitted for {self.card.widths[slug]}; fit it again for this store"
            )
        # In float32 always: under autocast a half-precision matrix product would blur the targets.
        with torch.autocast(features.device.type, enabled=False):
            values = features.float()
            if self.card.unit_input:
                values = F.normalize(values, dim=-1)
            if slug not in self.mapped:
                return values
            return F.linear(values, getattr(self, f"weight_{index}"), getattr(self, f"{tower}_bias_{index}"))

    def check(self, cards: Mapping[str, TeacherCard]) -> None:
        """Raise UserError if the alignment was fitted without one of these teachers (slug to card),
        TeacherMismatchError if a teacher's features were made with other weights or preprocessing since."""
        for slug, card in cards.items():
            self._index(slug)
            if self.card.teachers[slug] != card.digest:
                raise TeacherMismatchError(
                    f"the alignment was fitted on teacher {slug} of digest {self.card.teachers[slug]}, "
                    f"the store's has {card.digest}; run `mmkd align` on this store"
                )

    def _index(self, slug: str) -> int:
        if slug not in self.slugs:
            raise UserError(f"the alignment has no teacher {slug!r}; it was fitted for {', '.join(self.slugs)}")
        return self.slugs.index(slug)


def save(alignment: Alignment, path: Path) -> None:
    """Write `path` (`.safetensors`) in one step, and its card beside it as `.json`. Raises StoreError if the disk is
    full or read-only; a file that was there stays."""
    maps = {slug: alignment.teacher_map(slug) for slug in sorted(alignment.mapped)}
    tensors = {f"{slug}/{part}": getattr(maps[slug], part).cpu().contiguous() for slug in maps for part in _PARTS}
    card = alignment.card.model_dump_json()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    write_atomically(path, encode_safetensors(arrays, {"mmkd": card, "sha256": _checksum(card, tensors)}))
    write_atomically(path.with_suffix(".json"), (alignment.card.model_dump_json(indent=1) + "\n").encode())


def load(path: Path) -> Alignment:
    """Read an alignment without unpickling. Raises UserError if there is none; FormatVersionError if a newer mmkd wrote
    it; CorruptStoreError if its bytes are not what was written, or its shapes do not fit its card."""
    if not path.is_file():
        raise UserError(f"no alignment at {path}; `mmkd align STORE RUN.yaml` writes one")
    fault, advice = f"{path} is not a whole safetensors file", "; fit the alignment again"
    with faults_as(CorruptStoreError, (SafetensorError, OSError), fault, advice), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
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
    with faults_as(CorruptStoreError, (ValueError, RecursionError), f"{path}: its card is not JSON"):
        content = json.loads(text)
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise FormatVersionError(
            f"{path} is of alignment format {content.get('format')!r}, this mmkd reads {FORMAT}; install a newer"
        )
    card = parse_document(AlignmentCard, content, path)
    if set(card.teachers) != set(card.widths):
        raise CorruptStoreError(f"{path}: its card gives digests and widths of different teachers")
    return card


def _checksum(card: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 in hex over the card, then name, shape and little-endian bytes of each tensor by name."""
    content = hashlib.sha256(card.encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.contiguous().numpy().astype(tensor.numpy().dtype.newbyteorder("<"), copy=False).tobytes())
    return content.hexdigest()
