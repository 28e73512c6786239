"""The rows that an alignment is fitted and judged on, and their features by the block or the batch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.distill.alignment.config import AlignConfig
from mmkd.distill.pairs import rows_where
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.store import FeatureStore
from mmkd.store.layout import Tower
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
        return self.image if tower == "image" else self.text


class AlignmentRows:
    """Rows of an alignment and the teachers' features of them, of norm 1 with `unit_input`."""

    def __init__(self, store: FeatureStore, config: AlignConfig) -> None:
        """Choose the rows. Raises UserError for a teacher, selection or column that does not exist, or too few rows."""
        self.slugs = check_teachers(store, config.teachers)
        self.widths = {slug: store.card(slug).dim for slug in self.slugs}
        self.unit_input = config.unit_input
        self._features = TeacherFeatures(store, self.slugs, config.selection)
        table = rows_where(store, config.where or "", ["row", "caption"])
        encoded = table["caption"].combine_chunks().dictionary_encode()
        captions = encoded.dictionary.to_pylist()
        # A function of the seed and the caption alone; rows without one are not held out.
        digests = (hashlib.blake2b(f"{config.seed}:{caption}".encode(), digest_size=8).digest() for caption in captions)
        numbers = [int.from_bytes(digest, "little") for digest in digests]
        held = np.array([*(number < config.held_out * 2**64 for number in numbers), False])
        caption_of = encoded.indices.fill_null(len(captions)).to_numpy()
        rows = table["row"].to_numpy()
        live = self._features.any_available()[rows]
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
        self.pairs = self._features.count_rows(self.fit)
        """Rows to fit on that each teacher has."""
        if lost := [slug for slug, count in self.pairs.items() if count < 2]:
            raise UserError(f"{store.root}: nothing to fit teacher {lost[0]} on; leave it out with `teachers:`")

    def gather(self, rows: NDArray[np.int64], device: torch.device | None = None) -> dict[str, TeacherRows]:
        """Gather the features of some rows, of each teacher where it has them."""
        out = {}
        for slug, target in zip(self.slugs, self._features.gather(rows), strict=True):
            present = target.present.all(1)
            image, text = (part[present].to(device).float() for part in (target.image, target.text))
            if self.unit_input:
                image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            out[slug] = TeacherRows(torch.nonzero(present)[:, 0].to(image.device), image, text)
        return out

    def blocks(self) -> Iterator[dict[str, TeacherRows]]:
        """Yield all rows to fit on, in grid order, `BLOCK` at a time."""
        for start in range(0, len(self.fit), BLOCK):
            yield self.gather(self.fit[start : start + BLOCK])
