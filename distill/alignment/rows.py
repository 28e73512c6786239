"""The rows that an alignment is fitted and judged on, and their features by the block or the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mmkd.base.conditions import parse_condition
from mmkd.base.errors import UserError
from mmkd.distill.alignment.config import AlignConfig
from mmkd.distill.teacher_features import as_tensor
from mmkd.store import FeatureStore
from mmkd.store.layout import TOWERS, Tower
from mmkd.store.selection.scores import check_teachers, draw_rows

BLOCK = 8192
_FEWEST = 20


@dataclass(frozen=True)
class TeacherRows:
    """One teacher's features of some rows: positions int64 (M,) among them, image and text float32 (M, E)."""

    members: torch.Tensor
    image: torch.Tensor
    text: torch.Tensor

    def tower(self, tower: Tower) -> torch.Tensor:
        """Return the features of one tower."""
        return self.image if tower == "image" else self.text


class AlignmentRows:
    """Rows of an alignment and the teachers' features of them, of norm 1 with `unit_input`."""

    def __init__(self, store: FeatureStore, config: AlignConfig) -> None:
        """Choose the rows. Raises UserError for a teacher, selection or column that is not there, or too few rows to
        fit or judge."""
        self.slugs = check_teachers(store, config.teachers)
        self.widths = {slug: store.card(slug).dim for slug in self.slugs}
        order = list(store.teachers)
        self.sound: NDArray[np.bool_] = store.available(config.selection)[:, [order.index(slug) for slug in self.slugs]]
        self.unit_input = config.unit_input
        mapped = {(slug, tower): store.features(slug, tower) for slug in self.slugs for tower in TOWERS}
        self._features: dict[tuple[str, Tower], Any] = {
            key: as_tensor(values) if isinstance(values, np.ndarray) else values for key, values in mapped.items()
        }
        condition = parse_condition(config.where, store.samples.schema) if config.where else None
        table = store.sample_table(["row", "caption"], filter=condition)
        encoded = table["caption"].combine_chunks().dictionary_encode()
        captions = encoded.dictionary.to_pylist()
        held = np.array([*(_is_held(caption, config) for caption in captions), False])
        caption_of = encoded.indices.fill_null(len(captions)).to_numpy()
        rows = table["row"].to_numpy()
        live = self.sound[rows].any(axis=1)
        self.fit: NDArray[np.int64] = rows[live & ~held[caption_of]]
        judged = np.flatnonzero(live & held[caption_of])
        for what, count in (("fit on", len(self.fit)), ("judge by", len(judged))):
            if count < _FEWEST:
                raise UserError(
                    f"{store.root}: {count} rows to {what} (selection {config.selection}, where {config.where}, "
                    f"held_out {config.held_out}), expected {_FEWEST} or more"
                )
        if len(judged) > config.judge_rows:
            judged = draw_rows(judged, config.judge_rows, config.seed, "the judge")
        self.judged: NDArray[np.int64] = rows[judged]
        self.judged_captions: NDArray[np.int64] = caption_of[judged].astype(np.int64)
        lost = [slug for slug, count in zip(self.slugs, self.sound[self.fit].sum(axis=0), strict=True) if count < 2]
        if lost:
            raise UserError(f"{store.root}: nothing to fit teacher {lost[0]} on; leave it out with `teachers:`")

    def pairs(self, slug: str) -> int:
        """Count the rows to fit on that a teacher has."""
        return int(self.sound[self.fit, self.slugs.index(slug)].sum())

    def gather(self, rows: NDArray[np.int64], device: torch.device | None = None) -> dict[str, TeacherRows]:
        """Gather the features of some rows, of each teacher where it has them."""
        out = {}
        for t, slug in enumerate(self.slugs):
            members = np.flatnonzero(self.sound[rows, t])
            picked = torch.from_numpy(rows[members])
            image, text = (self._gather_tower(slug, tower, picked, device) for tower in TOWERS)
            out[slug] = TeacherRows(torch.from_numpy(members).to(image.device), image, text)
        return out

    def blocks(self) -> Iterator[dict[str, TeacherRows]]:
        """Yield all rows to fit on, in grid order, `BLOCK` at a time."""
        for start in range(0, len(self.fit), BLOCK):
            yield self.gather(self.fit[start : start + BLOCK])

    def _gather_tower(self, slug: str, tower: Tower, rows: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        source = self._features[slug, tower]
        if isinstance(source, torch.Tensor):
            values = source.index_select(0, rows)
        else:  # encoded features, which the store decodes on access
            values = torch.from_numpy(np.asarray(source[rows.numpy()]))
        values = values.to(device).float() if device else values.float()
        return F.normalize(values, dim=-1) if self.unit_input else values


def _is_held(caption: str, config: AlignConfig) -> bool:
    """Return True if a caption is held out, a function of the seed and the caption alone."""
    content = hashlib.blake2b(f"{config.seed}:{caption}".encode(), digest_size=8)
    return int.from_bytes(content.digest(), "little") < config.held_out * 2**64
