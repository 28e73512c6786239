"""Inputs through a teacher in batches that fit its device, with results that do not depend on how they were cut.

On a CPU every forward pass has exactly `PASS_ROWS` rows, the last filled up with its own last row: a matrix product may
round differently for another shape, not for other neighbors in the same shape. On a GPU a batch is one pass.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.extract.teachers.loaded import out_of_memory
from mmkd.extract.teachers.protocol import Teacher
from mmkd.store.encoding import value_type
from mmkd.store.layout import Tower

log = logging.getLogger(__name__)

PASS_ROWS = 32
"""Rows of a forward pass on a CPU, always."""

GPU_ROWS = 256
"""Rows a batch starts with on a GPU: its products are large enough to fill the device."""


@dataclass
class BatchSizes:
    """Rows handed to each teacher at once; one object for a process, shared by its threads. What was too much for the
    device once is not tried again."""

    start_rows: int | None = None
    """Empty: `PASS_ROWS` on a CPU, `GPU_ROWS` on a GPU."""
    halved: dict[tuple[str, Tower], int] = field(default_factory=dict)
    """By teacher and tower; only those that did not fit."""
    device: threading.Lock = field(default_factory=threading.Lock)
    """Held while a batch is on the device: two shards in hand share it, and never its memory at the same time."""

    def rows(self, teacher: Teacher, tower: Tower) -> int:
        return self.halved.get((teacher.card.slug, tower), self.window(teacher.device))

    def window(self, device: torch.device) -> int:
        """Return rows of a batch before any was too large."""
        return self.start_rows or (PASS_ROWS if device.type == "cpu" else GPU_ROWS)


def encode(teacher: Teacher, tower: Tower, inputs: torch.Tensor, sizes: BatchSizes) -> NDArray[np.floating[Any]]:
    """Return features (n, D) in the float type that the encoding keeps. Raises TeacherError if the device has too
    little memory for a single row. `inputs`: (n, ...) in main memory: uint8 pixels or int64 token ids."""
    features = np.empty((len(inputs), teacher.card.dim), dtype=value_type(teacher.card.encoding))
    call = teacher.encode_images if tower == "image" else teacher.encode_texts
    done = 0
    while done < len(inputs):
        rows = sizes.rows(teacher, tower)
        batch = inputs[done : done + rows]
        try:
            with sizes.device, np.errstate(over="ignore"):
                features[done : done + len(batch)] = _in_passes(call, batch, teacher.device)
            done += len(batch)
            continue
        except torch.OutOfMemoryError:
            pass  # halved outside: the exception holds the frames, and they hold the tensors that did not fit
        slug, device = teacher.card.slug, teacher.device
        if rows == 1:
            raise out_of_memory(slug, device, tower)
        sizes.halved[slug, tower] = rows // 2
        log.warning("teacher %r: batches of %d rows (%s) do not fit on %s: halved", slug, rows, tower, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return features


def _in_passes(
    call: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, device: torch.device
) -> NDArray[np.float32]:
    if device.type != "cpu":
        # Pinned memory, so that the copy need not wait for the passes before it.
        moved = batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)
        return call(moved).float().cpu().numpy()
    parts = []
    for start in range(0, len(batch), PASS_ROWS):
        part = batch[start : start + PASS_ROWS]
        surplus = part[-1:].expand(PASS_ROWS - len(part), *part.shape[1:])
        parts.append(call(torch.cat([part, surplus])).float().cpu().numpy()[: len(part)])
    return np.concatenate(parts)
