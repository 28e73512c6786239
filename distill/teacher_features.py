"""Teachers' stored features as training targets: a gather from the memory map, or rows that live on the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.store import FeatureStore
from mmkd.store.array import FeatureArray
from mmkd.store.layout import TOWERS, Tower

# Of the device memory that is free before training: the rest is for weights, their moments and activations.
RESIDENT_SHARE = 0.5


@dataclass(frozen=True)
class TeacherTargets:
    """One teacher's features for the B rows of a batch. image, text: (B, E), E its width, in the store's own type, as
    stored; rows that the teacher lacks are zero, and so is a tower that it has not. present: bool (B,), where it has
    all its towers."""

    image: torch.Tensor
    text: torch.Tensor
    present: torch.Tensor

    def to(self, device: torch.device) -> TeacherTargets:
        """Return the same rows on `device`; from pinned memory without waiting."""
        return TeacherTargets(*(part.to(device, non_blocking=True) for part in (self.image, self.text, self.present)))


def pack_available(available: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return bool (N, T) as bits, uint8 (N, T / 8): what a run keeps of a hundred million rows."""
    return np.packbits(available, axis=1)


class TeacherFeatures:
    """Rows of all teachers of a run. Mapped, only the rows of a batch are ever read."""

    def __init__(
        self,
        store: FeatureStore,
        slugs: Sequence[str],
        selection: str | None = None,
        available: NDArray[np.uint8] | None = None,
    ) -> None:
        """Open the features of teachers. `available`: `pack_available` of these teachers, where it is known already."""
        self.slugs = tuple(slugs)
        self.cards = {slug: store.card(slug) for slug in slugs}
        self.dims = tuple(card.dim for card in self.cards.values())
        self.towers = tuple(card.towers for card in self.cards.values())
        self._parts: list[dict[Tower, torch.Tensor | FeatureArray]] = [
            {tower: as_tensor(store.features(slug, tower)) for tower in card.towers}
            for slug, card in self.cards.items()
        ]
        if available is None:
            order = list(store.teachers)
            available = pack_available(store.available(selection)[:, [order.index(slug) for slug in slugs]])
        self._available = available
        self._device = torch.device("cpu")
        self.resident_bytes = 0
        """Features held in memory of this process or its device."""

    def any_available(self) -> NDArray[np.bool_]:
        """Return where at least one teacher has the features of all its towers, bool (N,)."""
        found: NDArray[np.bool_] = self._available.any(axis=1)
        return found

    def count_pairs(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Count the rows of these of which each teacher has the features of all its towers."""
        counts = self._present(rows).sum(axis=0)
        return dict(zip(self.slugs, counts.tolist(), strict=True))

    def _present(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return where each teacher has all its towers, bool (B, T)."""
        return np.unpackbits(self._available[rows], axis=1, count=len(self.slugs)).astype(bool)

    @property
    def bytes(self) -> int:
        """Bytes of all gathered features: int8 counts as the float32 it decodes to."""
        every = (part for parts in self._parts for part in parts.values())
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in every)

    def fits(self, device: torch.device) -> bool:
        """Return True when all features fit on a CUDA device beside the training."""
        return device.type == "cuda" and self.bytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]

    def reside(self, device: torch.device) -> None:
        """Copy everything to the device, once, int8 features decoded; on the CPU, into memory of its own."""

        def copy(part: torch.Tensor | FeatureArray) -> torch.Tensor:
            if isinstance(part, torch.Tensor):
                return part.to(device, copy=True)
            return torch.from_numpy(np.array(part[:])).to(device)

        self._parts = [{tower: copy(part) for tower, part in parts.items()} for parts in self._parts]
        self._device, self.resident_bytes = device, self.bytes

    def gather(self, rows: NDArray[np.int64]) -> tuple[TeacherTargets, ...]:
        """Return all teachers' features of these rows, in the order of `slugs`: on the device when resident, else
        pinned."""
        picked, targets = torch.from_numpy(rows).to(self._device), []
        have = torch.from_numpy(np.ascontiguousarray(self._present(rows).T)).to(self._device)
        for parts, dim, present in zip(self._parts, self.dims, have, strict=True):
            image, text = (self._select(parts.get(tower), dim, picked, present) for tower in TOWERS)
            targets.append(TeacherTargets(image, text, present))
        return tuple(targets)

    def _select(
        self, source: torch.Tensor | FeatureArray | None, dim: int, rows: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        if source is None:
            return torch.zeros(len(rows), dim, dtype=torch.float16, device=self._device)
        pinned = torch.cuda.is_available() and self._device.type == "cpu"
        if isinstance(source, torch.Tensor):
            shape = (len(rows), source.shape[1])
            chosen = torch.empty(shape, dtype=source.dtype, device=self._device, pin_memory=pinned)
            # One pass over the mapped pages, straight to where the copy to the device starts.
            torch.index_select(source, 0, rows, out=chosen)
        else:
            chosen = torch.from_numpy(source[rows.numpy()])
            chosen = chosen.pin_memory() if pinned else chosen
        chosen[~present] = 0  # NaN in the store; a product with zero would keep it
        return chosen


def as_tensor(features: FeatureArray) -> torch.Tensor | FeatureArray:
    """Return a tensor over the mapped pages; int8 features, and those behind a URL, stay what they are."""
    if not isinstance(features, np.ndarray):
        return features
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; nothing here writes, and the pages would fault.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(features)
