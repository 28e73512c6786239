"""Inputs on a device through a teacher, in passes that fit its memory. On an accelerator a short search finds their
rows: twice as many until throughput stops growing; remembered for the next run."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.base.notes import read_note, write_note
from mmkd.base.process import Watch
from mmkd.extract.device import PASS_ROWS, Device, Encode, Pass
from mmkd.extract.report import Clock, ShardReport
from mmkd.extract.teachers.loaded import LoadedTeacher, out_of_memory
from mmkd.extract.teachers.spec import Teacher
from mmkd.store.layout import Tower

log = logging.getLogger(__name__)

Values = NDArray[np.floating[Any]]

FIRST, LAST, GAIN = 32, 512, 1.05
_PASSES = 3


@dataclass
class BatchSizes:
    """Rows of each teacher's passes; one object for a process. What was too much once is not tried again."""

    start_rows: int = PASS_ROWS
    found: dict[tuple[str, Tower], int] = field(default_factory=dict)
    """By teacher and tower, where a search found better ones."""
    halved: dict[tuple[str, Tower], int] = field(default_factory=dict)
    """Those that did not fit."""

    def rows(self, teacher: Teacher, tower: Tower) -> int:
        return self.halved.get((teacher.card.slug, tower), self.window(teacher, tower))

    def window(self, teacher: Teacher, tower: Tower) -> int:
        """Return rows of a pass before any was too large."""
        return self.found.get((teacher.card.slug, tower), self.start_rows)


def launch(teacher: Teacher, tower: Tower, inputs: torch.Tensor, device: Device, sizes: BatchSizes) -> list[Pass]:
    """Launch the passes over inputs (n, ...) that are on the device: uint8 pixels or int64 token ids. Raises
    TeacherError if the device has too little memory for a single row."""
    encode = encoder(teacher, tower, device)
    passes: list[Pass] = []
    done = 0
    while done < len(inputs):
        rows = sizes.rows(teacher, tower)
        try:
            passes.append(device.launch(encode, inputs[done : done + rows]))
            done += rows
            continue
        except torch.OutOfMemoryError:
            pass  # halved outside: the exception holds the frames, and they hold the tensors that did not fit
        slug = teacher.card.slug
        if rows == 1:
            raise out_of_memory(slug, teacher.device, tower)
        sizes.halved[slug, tower] = rows // 2
        log.warning("teacher %r: batches of %d rows (%s) do not fit on %s: halved", slug, rows, tower, teacher.device)
        device.release()
    return passes


def encoder(teacher: Teacher, tower: Tower, device: Device) -> Encode:
    """Return the function of a teacher that is launched on this device."""
    if (checker := _checker(teacher, device)) is not None:
        return partial(checker.launch, tower)
    return teacher.encode_images if tower == "image" else teacher.encode_texts


def _checker(teacher: Teacher, device: Device) -> LoadedTeacher | None:
    # What a pass gives is looked at when it is collected: looking at once would wait for it.
    return teacher if device.ahead and isinstance(teacher, LoadedTeacher) else None


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


class Queue:
    """Windows on the device, the oldest first: at most `Device.ahead` besides the one that is launched."""

    def __init__(self, device: Device, sizes: BatchSizes, watch: Watch, report: ShardReport) -> None:
        self.device, self.sizes, self.watch, self.report = device, sizes, watch, report
        self.clock = Clock(report.seconds)
        self._windows: deque[list[Callable[[], None]]] = deque([[]])

    def stage(self, rows: Sequence[NDArray[Any]]) -> torch.Tensor:
        """Return `Device.stage(rows)`, if need be once the device is empty. Raises UserError if that is too little."""
        for last in (False, True):
            try:
                return self.device.stage(rows)
            except torch.OutOfMemoryError as error:
                if last:
                    what = f"{self.device.place} has no memory for {len(rows)} inputs of {rows[0].shape}"
                    raise UserError(f"{what}; set worker.batch_rows to less than {len(rows)}") from error
            self.settle()
            self.device.release()
        raise AssertionError

    def launch(self, teacher: Teacher, tower: Tower, inputs: torch.Tensor, target: Values, places: Any) -> None:
        """Launch a teacher's passes over inputs on the device. Their features become the rows `places` of `target`,
        which is (n, D) in the float type that the encoding keeps."""
        with self.clock("device"):
            passes = launch(teacher, tower, inputs, self.device, self.sizes)
        self._windows[-1].append(partial(self._collect, teacher, tower, inputs, passes, target, places))
        self.watch.beat()

    def settle(self, left: int = 0) -> None:
        """End a window: what is launched from here on belongs to the next. Collect the oldest until `left` remain."""
        self._windows.append([])
        while len(self._windows) > left + 1:
            for collect in self._windows.popleft():
                collect()
                self.watch.beat()

    def _collect(
        self, teacher: Teacher, tower: Tower, inputs: torch.Tensor, passes: list[Pass], target: Values, places: Any
    ) -> None:
        """Wait for passes, and put the features to their rows. Raises TeacherError if the device has too little memory
        for a row in float32."""
        done, checker, name = 0, _checker(teacher, self.device), f"{tower} {teacher.card.slug}"
        with self.clock("device"):
            for one in passes:
                values = one.wait()
                span = slice(done, done + len(values))
                if checker is not None:
                    rows = max(1, min(PASS_ROWS, self.sizes.rows(teacher, tower) // 2))
                    try:
                        values = checker.recompute_overflow(tower, inputs[span], values, rows)
                    except torch.OutOfMemoryError as error:
                        raise out_of_memory(teacher.card.slug, teacher.device, tower) from error
                with np.errstate(over="ignore"):
                    target[places[span]] = values.numpy()
                done = span.stop
        self.clock.add(name, sum(one.seconds() for one in passes))
        if isinstance(teacher, LoadedTeacher):
            self.report.flops[name] = self.report.flops.get(name, 0.0) + teacher.flops(tower, inputs)
