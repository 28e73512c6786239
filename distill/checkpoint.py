"""A run's state on disk: one safetensors file a checkpoint, whole or not there, read without unpickling.

    OUT/run.json, source.json                   the configuration; the store that it learns from
    OUT/checkpoints/step-00000500.safetensors   tensors, and in the header's metadata the state as JSON
    OUT/best.json                               which step is the best so far, and its score

Tensors are named `model.NAME`, `average.NAME` and `optimiser.NAME.MOMENT`. Everything else that a run needs
to go on is a function of the step: learning rate, order of samples, crops, dropout.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors, write_atomically
from mmkd.distill.optimizer import WeightAverage

FOLDER = "checkpoints"
BEST = "best.json"

_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows beside tensors."""

    step: int
    """Steps done."""
    best_score: float | None = None
    best_step: int | None = None
    best_scores: dict[str, float] = field(default_factory=dict)
    """Every score of the best validation, by `SET/METRIC`."""
    worse: int = 0
    """Validations since the best one."""


@dataclass(frozen=True)
class State:
    """One checkpoint, read."""

    progress: Progress
    tensors: dict[str, torch.Tensor]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name begins with `prefix.`, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


@dataclass
class Checkpointer:
    """Writes and finds the checkpoints of one run."""

    out: Path
    digest: str
    keep_last: int
    difference: Callable[[], str]
    """Says what is other than in the run that `out` holds; empty when it is not known."""

    def save(
        self,
        model: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        average: WeightAverage | None,
        progress: Progress,
    ) -> Path:
        """Write the state; then let older checkpoints go, but for the last few and the best.

        Raises:
            StoreError: the disk is full or read-only; earlier checkpoints stay.
        """
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in (average.values if average else {}).items()}
        tensors |= _moments(model, optimiser)
        header = {"mmkd": json.dumps({"run": self.digest} | vars(progress))}
        path = self.out / FOLDER / f"step-{progress.step:08d}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(temporary, tensors, header)
                temporary.replace(path)
                _flush_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        if progress.best_step == progress.step:
            note = {"step": progress.step, "score": progress.best_score}
            write_atomically(self.out / BEST, json.dumps(note).encode())
        self._forget(progress)
        return path

    def load(self) -> State | None:
        """The last checkpoint, or None for a new run.

        Raises:
            UserError: it belongs to another run, or the place is a file or a store.
            CorruptStoreError: it is damaged.
        """
        if self.out.is_file() or (self.out / "zarr.json").is_file():
            what = "a file" if self.out.is_file() else "a store"
            raise UserError(f"out: {self.out} is {what}; name a folder of its own for the run")
        paths = checkpoints(self.out)
        if not paths:
            return None
        run, state = read(paths[-1])
        if run != self.digest:
            raise UserError(
                f"{self.out} holds a run of another configuration or store "
                f"({self.difference() or f'digest {run}, this one has {self.digest}'}); "
                "name another `out`, or delete that folder"
            )
        return state

    def _forget(self, progress: Progress) -> None:
        with disk_errors(self.out):
            for path in checkpoints(self.out)[: -self.keep_last]:
                if step_of(path) != progress.best_step:
                    path.unlink(missing_ok=True)


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of a run folder, oldest first."""
    return sorted((path for path in (out / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Steps done at a checkpoint, by its name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None, "only checkpoints are asked for"
    return int(found[1])


def best_or_last(out: Path) -> Path:
    """The checkpoint to export or to go on from with another run.

    Raises:
        UserError: there is none.
    """
    paths = checkpoints(out)
    if not paths:
        raise UserError(f"{out} has no checkpoint yet; `mmkd distill` writes one every checkpoints.every_steps")
    note = out / BEST
    best = json.loads(note.read_text())["step"] if note.is_file() else None
    return next((path for path in paths if step_of(path) == best), paths[-1])


def read(path: Path) -> tuple[str, State]:
    """Digest of the run, and the state.

    Raises:
        CorruptStoreError: the file is not a whole checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["mmkd"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        digest: str = header.pop("run")
        return digest, State(Progress(**header), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CorruptStoreError(
            f"{path} is damaged ({' '.join(str(error).split())[:80]}); delete it to go on from the one before"
        ) from error


def student_weights(state: State) -> dict[str, torch.Tensor]:
    """The student's own weights, averaged ones when the run averaged."""
    prefix = "average.student" if any(name.startswith("average.") for name in state.tensors) else "model.towers.student"
    return state.part(prefix)


def restore_optimiser(model: torch.nn.Module, optimiser: torch.optim.Optimizer, state: State) -> None:
    """Give every parameter its moments back."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.part("optimiser").items():
        parameter, _, moment = name.rpartition(".")
        moments.setdefault(parameter, {})[moment] = tensor
    # The fused optimizer wants moments to lie in memory as their parameter does (channels last).
    for owner, name in names.items():
        for moment, tensor in moments.get(name, {}).items():
            if tensor.shape == owner.shape:
                moments[name][moment] = torch.empty_like(owner).copy_(tensor)
    members = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    saved: dict[str, Any] = optimiser.state_dict()
    saved["state"] = {i: moments[names[p]] for i, p in enumerate(members) if names[p] in moments}
    optimiser.load_state_dict(saved)


def _moments(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimiser.{names[parameter]}.{moment}": value
        for parameter, moments in optimiser.state.items()
        for moment, value in moments.items()
    }


def _write(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> None:
    # Clones where storage is shared: safetensors refuses two names for one memory.
    try:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path, header)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
