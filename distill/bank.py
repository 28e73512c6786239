"""The bank: stored teacher features of many more rows than a batch has, kept on the device, refreshed by order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.distill.batch import TeacherTargets
from mmkd.distill.config import BankConfig
from mmkd.distill.losses import PairFeatures

# Keeps the bank's order apart from that of the epochs, which are numbered from 0.
_ORDER = 2**64 - 1


class Bank:
    """K rows of all teachers. Its rows are a function of (seed, step), so no checkpoint holds it. The rows have one
    shuffled order, taken cyclically; at step s the bank holds the places s*r to s*r + K of it, r rows being replaced
    each step. No row is in it twice. rows: int64 (n,) grid rows of the run. group: int64 (n,) or (n, 2), see
    `Batch.groups`. gather: reads the store. prepare: aligns and normalizes."""

    def __init__(
        self,
        rows: NDArray[np.int64],
        group: NDArray[np.int64],
        gather: Callable[[NDArray[np.int64]], Sequence[TeacherTargets]],
        prepare: Callable[[Sequence[TeacherTargets], torch.Tensor], list[PairFeatures]],
        *,
        config: BankConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.rows, self.group, self.gather, self.prepare, self.device = rows, group, gather, prepare, device
        self.size = min(config.size, len(rows))
        self.refresh = config.refresh if self.size < len(rows) else 0
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, _ORDER], dtype=np.uint64)))
        self._order = generator.permutation(len(rows))
        self._end = 0
        self._rows = torch.zeros(self.size, dtype=torch.int64, device=device)
        self._teachers: list[PairFeatures] = []

    def at(self, step: int, batch_rows: torch.Tensor) -> list[PairFeatures]:
        """Return each teacher's rows at `step`, those of the batch (int64 grid rows, all ranks) not available."""
        first = step * self.refresh
        end = first + self.size
        standing = bool(self._teachers) and first <= self._end <= end
        if not standing or self._end < end:
            places = np.arange(self._end if standing else first, end)  # of the endless order
            chosen = self._order[places % len(self._order)]
            rows, group = self.rows[chosen], torch.from_numpy(self.group[chosen]).to(self.device)
            prepared = self.prepare([target.to(self.device) for target in self.gather(rows)], group)
            slots = torch.from_numpy(places % self.size).to(self.device)
            self._rows[slots] = torch.from_numpy(rows).to(self.device)
            if not self._teachers:
                self._teachers = [PairFeatures(*map(torch.empty_like, _parts(pairs))) for pairs in prepared]
            for kept, new in zip(self._teachers, prepared, strict=True):
                for old_part, new_part in zip(_parts(kept), _parts(new), strict=True):
                    old_part[slots] = new_part
            self._end = end
        free = ~torch.isin(self._rows, batch_rows.to(self.device))
        return [replace(pairs, available=pairs.mask & free) for pairs in self._teachers]


def _parts(pairs: PairFeatures) -> tuple[torch.Tensor, ...]:
    return pairs.image, pairs.text, pairs.group, pairs.mask
