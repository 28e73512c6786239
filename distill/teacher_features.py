"""Teachers' stored features as training targets: one gather from the memory map per teacher and step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.store import PAIR_SOUND, FeatureStore
from mmkd.store.array import FeatureArray


@dataclass(frozen=True)
class TeacherBatch:
    """What one teacher says of the rows of a batch for which it has something to say.

    members: int64 (M,), positions within the batch.
    image, text: float32 (M, E), as stored; the losses normalise.
    """

    members: torch.Tensor
    image: torch.Tensor
    text: torch.Tensor


class TeacherFeatures:
    """Rows of all teachers of a run. Only the rows of a batch are ever read."""

    def __init__(self, store: FeatureStore, slugs: Sequence[str]) -> None:
        self.slugs = tuple(slugs)
        self.dims = tuple(store.card(slug).dim for slug in slugs)
        self._image = [_indexable(store.image(slug)) for slug in slugs]
        self._text = [_indexable(store.text(slug)) for slug in slugs]
        self._sound = [store.valid(slug) & PAIR_SOUND == PAIR_SOUND for slug in slugs]

    def available(self) -> NDArray[np.bool_]:
        """bool (N, T): where a teacher has both features."""
        return np.stack(self._sound, axis=1)

    def gather(self, rows: NDArray[np.int64], device: torch.device) -> list[TeacherBatch]:
        """The batch of every teacher, in the order of `slugs`."""
        batches = []
        for image, text, sound in zip(self._image, self._text, self._sound, strict=True):
            members = np.flatnonzero(sound[rows])
            picked = rows[members]
            batches.append(
                TeacherBatch(
                    torch.from_numpy(members).to(device),
                    _rows(image, picked).to(device).float(),
                    _rows(text, picked).to(device).float(),
                )
            )
        return batches


def _indexable(features: FeatureArray) -> torch.Tensor | FeatureArray:
    """A tensor over the mapped pages; int8 features, and those behind a URL, stay what they are."""
    return as_tensor(features) if isinstance(features, np.ndarray) else features


def _rows(features: torch.Tensor | FeatureArray, rows: NDArray[np.int64]) -> torch.Tensor:
    """These rows (M, E): of a tensor by index_select, which is one pass over the pages; else decoded by the store."""
    if isinstance(features, torch.Tensor):
        return features.index_select(0, torch.from_numpy(rows))
    return torch.from_numpy(features[rows])


def as_tensor(mapped: NDArray[np.float16]) -> torch.Tensor:
    """The mapped array as a float16 tensor over the same pages."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; nothing here writes, and the pages would fault.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(mapped)
