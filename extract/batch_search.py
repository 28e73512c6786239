"""Rows of a pass by a short search: twice as many until throughput stops growing; remembered for the next run."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.notes import read_note, write_note
from mmkd.extract.device import Device, Encode
from mmkd.extract.forward import encoder
from mmkd.extract.teachers.protocol import Teacher
from mmkd.store.layout import Tower

FIRST, LAST, GAIN = 32, 512, 1.05
_PASSES = 3


def search_rows(teacher: Teacher, device: Device, settings: object) -> dict[tuple[str, Tower], int]:
    """Return rows for the towers of a teacher. `settings`: what else changes the speed of a pass, for the note."""
    card, found = teacher.card, dict[tuple[str, Tower], int]()
    for tower in card.towers:
        if tower == "text":
            one: NDArray[np.generic] = teacher.tokenize([""])[0][0].numpy()
        else:
            look = card.image_preprocessing
            one = np.zeros((1 if look.color == "L" else 3, *look.image_size), dtype=np.uint8)
        about = [device.name, torch.__version__, card.digest, tower, settings]
        rows = read_note("batch-rows", about)
        if rows is None:
            rows = _search(device, encoder(teacher, tower, device), one)
            write_note("batch-rows", about, rows)
        found[card.slug, tower] = int(rows)
    return found


def _search(device: Device, encode: Encode, one: NDArray[np.generic]) -> int:
    found, best, rows = FIRST, 0.0, FIRST
    while rows <= LAST:
        try:
            rate = rows / max(_pass_seconds(device, encode, one, rows), 1e-9)
        except torch.OutOfMemoryError:
            break
        if rate < GAIN * best:
            break
        found, best, rows = rows, rate, 2 * rows
    device.release()
    return found


def _pass_seconds(device: Device, encode: Encode, one: NDArray[np.generic], rows: int) -> float:
    """Return the mean seconds of a pass; the first one of a shape, which chooses its kernels, does not count."""
    inputs = device.stage([one] * rows)
    passes = [device.launch(encode, inputs) for _ in range(1 + _PASSES)]
    for launched in passes:
        launched.wait()
    return sum(launched.seconds() for launched in passes[1:]) / _PASSES
