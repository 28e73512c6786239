"""Teachers' stored features as training targets: a gather from the memory map, or rows that live on the device."""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.store import FeatureStore
from mmkd.store.array import DecodedRows, FeatureArray
from mmkd.store.card import TeacherCard
from mmkd.store.chunk import ask_for_rows
from mmkd.store.layout import SOUND_BIT, TOWERS, Tower

# Of the device memory that is free before training: the rest is for weights, their moments and activations.
RESIDENT_SHARE = 0.5


@dataclass(frozen=True)
class TeacherTargets:
    """One teacher's features for the B rows of a batch. image, text: (B, E), E its width, in the store's own type, as
    stored; what the teacher lacks is zero. present: bool (B, 2), where its image, its text is there and teaches."""

    image: torch.Tensor
    text: torch.Tensor
    present: torch.Tensor

    def to(self, device: torch.device) -> "TeacherTargets":
        """Return the same rows on `device`; from pinned memory without waiting."""
        return TeacherTargets(*(part.to(device, non_blocking=True) for part in (self.image, self.text, self.present)))

    def masked(self, has: torch.Tensor) -> "TeacherTargets":
        """Return the same rows, present only where `has`, bool (B, 2), is True."""
        return replace(self, present=self.present & has.to(self.present.device))


def taught_bits(
    valid_NT: NDArray[np.uint8], cards: Sequence[TeacherCard], chosen_NT: NDArray[np.bool_], *, unpaired: bool
) -> NDArray[np.uint8]:
    """Return which features of N rows teach, two bits for each teacher, uint8 (N, 2 T / 8): what a run keeps of a
    hundred million rows. chosen: where a teacher has all its towers and the selection keeps the pair."""
    whole_T = np.array([card.all_sound for card in cards], dtype=np.uint8)
    there_NT = np.where(chosen_NT, whole_T, np.uint8(0))
    if unpaired:
        there_NT = np.where(valid_NT == whole_T, there_NT, valid_NT)
    towers = [there_NT & np.uint8(SOUND_BIT[tower]) > 0 for tower in TOWERS]
    return np.packbits(np.stack(towers, axis=2).reshape(len(there_NT), -1), axis=1)


def unpack_taught(bits: NDArray[np.uint8], teachers: int) -> NDArray[np.bool_]:
    """Return `taught_bits` as bool (B, T, 2)."""
    return np.unpackbits(bits, axis=1, count=2 * teachers).reshape(len(bits), teachers, 2).astype(bool)


class TeacherFeatures:
    """Rows of all teachers of a run. Mapped, only the rows of a batch are ever read."""

    def __init__(
        self,
        store: FeatureStore,
        slugs: Sequence[str],
        selection: str | None = None,
        *,
        unpaired: bool = False,
        taught: NDArray[np.uint8] | None = None,
    ) -> None:
        """A teacher teaches a row of which it has the features of all its towers, if the selection keeps the pair. With
        `unpaired` also one of which it has one feature of two, which no selection judges. taught: `taught_bits` of
        these teachers, where they are known already."""
        self.slugs = tuple(slugs)
        self.cards = {slug: store.card(slug) for slug in slugs}
        self.dims = tuple(card.dim for card in self.cards.values())
        self.towers = tuple(card.towers for card in self.cards.values())
        self._parts: list[dict[Tower, torch.Tensor | FeatureArray]] = [
            {tower: as_tensor(store.features(slug, tower)) for tower in card.towers}
            for slug, card in self.cards.items()
        ]
        if taught is None:
            chosen, order = store.available(selection), list(store.teachers)
            valid = np.stack([store.valid(slug) for slug in slugs], axis=1)
            taught = taught_bits(
                valid, list(self.cards.values()), chosen[:, [order.index(slug) for slug in slugs]], unpaired=unpaired
            )
        self._taught = taught
        self._look = isinstance(store.root, Path) and os.access(store.root, os.W_OK)
        self._device = torch.device("cpu")
        self.resident_bytes = 0
        """Features held in memory of this process or its device."""

    def any_available(self) -> NDArray[np.bool_]:
        """Return where at least one teacher teaches, bool (N,)."""
        return np.asarray(self._taught.any(axis=1))

    def count_rows(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Count the rows of these that each teacher teaches."""
        return dict(zip(self.slugs, self.present(rows).any(axis=2).sum(axis=0).tolist(), strict=True))

    def present(
        self, rows: NDArray[np.int64], images: NDArray[np.int64] | None = None, texts: NDArray[np.int64] | None = None
    ) -> NDArray[np.bool_]:
        """Return which features of these rows are there and teach, bool (B, T, 2); see `gather`."""
        have = unpack_taught(self._taught[rows], len(self.slugs))
        for tower, others in enumerate((images, texts)):
            if others is not None:
                have[:, :, tower] &= unpack_taught(self._taught[others], len(self.slugs))[:, :, tower]
        return have

    def check_rows(self, what: str, tower: Tower, rows: NDArray[np.int64]) -> None:
        """Raise UserError if a teacher with this tower has no feature of any of these rows of views or captions."""
        instead = ", or set data.captions to {own: 1}" if what == "captions" else ""
        for slug, count in self.count_rows(rows).items():
            if len(rows) and tower in self.cards[slug].towers and not count:
                step = f"run `mmkd extract` with it{instead}"
                raise UserError(f"data.{what}: teacher {slug} has no features of them; {step}")

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

    def gather(
        self,
        rows: NDArray[np.int64],
        wanted: torch.Tensor | None = None,
        *,
        images: NDArray[np.int64] | None = None,
        texts: NDArray[np.int64] | None = None,
    ) -> tuple[TeacherTargets, ...]:
        """Return all teachers' features of these rows, in the order of `slugs`: on the device when resident, else
        pinned. Those that are not `wanted`, bool (B, T), are not read, and are zero. images, texts: rows whose features
        of this tower stand for theirs."""
        read = [torch.from_numpy(rows if part is None else part).to(self._device) for part in (images, texts)]
        have, targets = torch.from_numpy(self.present(rows, images, texts)).to(self._device), []
        asked = torch.ones_like(have[:, :, 0]) if wanted is None else wanted.to(self._device)
        if self._device.type == "cpu":
            for parts, mine in zip(self._parts, asked.unbind(1), strict=True):
                for tower, part in parts.items():
                    ask_for(part, read[TOWERS.index(tower)][mine], self._look)
        for parts, dim, present, mine in zip(self._parts, self.dims, have.unbind(1), asked.unbind(1), strict=True):
            found = []
            for tower, picked, there in zip(TOWERS, read, present.unbind(1), strict=True):
                some = (picked, there) if wanted is None else (picked[mine], there[mine])
                part = self._select(parts.get(tower), dim, *some)
                if wanted is not None:
                    part = part.new_zeros(len(rows), part.shape[1]).masked_scatter(mine[:, None], part)
                found.append(part)
            targets.append(TeacherTargets(found[0], found[1], present))
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


def ask_for(source: torch.Tensor | FeatureArray, rows: torch.Tensor, look: bool) -> None:
    """Have a disk read rows of what is mapped; see `ask_for_rows`."""
    codes = source.codes if isinstance(source, DecodedRows) else source
    if isinstance(codes, np.ndarray):
        codes = as_tensor(codes)
    if isinstance(codes, torch.Tensor):
        ask_for_rows(codes.data_ptr(), codes.stride(0) * codes.itemsize, rows.numpy(), look)


def as_tensor(features: FeatureArray) -> torch.Tensor | FeatureArray:
    """Return a tensor over the mapped pages; int8 features, and those behind a URL, stay what they are."""
    if not isinstance(features, np.ndarray):
        return features
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; nothing here writes, and the pages would fault.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(features)
