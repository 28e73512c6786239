"""A run's state on disk: one safetensors file a checkpoint, whole or not there, read without unpickling.

    OUT/checkpoints/step-00000500.safetensors   tensors; in the header's metadata the run's record and progress as JSON
    OUT/run.json                                the configuration of the last call, for people: nothing reads it

Tensors are named `model.NAME`, `average.NAME` and `optimizer.NAME.MOMENT`. Everything else that a run needs to go on is
a function of the step: learning rate, order of samples, crops, dropout. The run's record and the choice of the best
checkpoint are in the last checkpoint alone, so no kill leaves two files that disagree.
"""

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mmkd.base.errors import CorruptStoreError, UserError, faults_as
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors
from mmkd.distill.config import StudentConfig
from mmkd.distill.optimizer import WeightAverage
from mmkd.distill.presets import SCHEMES
from mmkd.distill.provenance import FirstWeights, RunRecord, content_digest
from mmkd.distill.student import build_student, set_preprocessing

FOLDER = "checkpoints"
CONFIG = "run.json"

_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class Progress:
    """Steps and validations of a run so far."""

    step: int
    """Steps done."""
    judge: str = ""
    """Metric that chooses the best checkpoint, and a digest of the rows that it looks at."""
    best_score: float | None = None
    best_step: int | None = None
    best_scores: dict[str, float] = field(default_factory=dict)
    """Every score of the best validation, by `SET/METRIC`."""
    worse: int = 0
    """Validations since the best one."""

    def after_validation(self, scores: dict[str, float], metric: str) -> "Progress":
        """Return the progress after a validation that `metric` judges."""
        if self.best_score is None or scores[metric] > self.best_score:
            return replace(self, best_score=scores[metric], best_step=self.step, best_scores=scores, worse=0)
        return replace(self, worse=self.worse + 1)


@dataclass(frozen=True)
class State:
    """Content of a checkpoint."""

    record: RunRecord
    progress: Progress
    tensors: dict[str, torch.Tensor]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors whose name begins with `prefix.`, without the prefix."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def save_checkpoint(
    out: Path,
    keep_last: int,
    record: RunRecord,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
) -> Path:
    """Write the state of the run in `out`, then delete all but the last few checkpoints and the best. Raises StoreError
    if the disk is full or read-only; earlier checkpoints stay."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in (average.values if average else {}).items()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{moment}": value for moment, value in moments.items()}
    header = {"mmkd": json.dumps({"record": record.model_dump(mode="json"), "progress": vars(progress)})}
    path = out / FOLDER / f"step-{progress.step:08d}.safetensors"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, tensors, header)
        for older in checkpoints(out)[:-keep_last]:
            if step_of(older) != progress.best_step:
                older.unlink(missing_ok=True)
    return path


def _write_atomically(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    # Clones where storage is shared: safetensors refuses two names for one memory.
    values = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        save_file(values, temporary, header)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except SafetensorError as error:  # wraps the system's error
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_last(out: Path, record: RunRecord) -> State | None:
    """Read the last checkpoint of the run that `record` describes; None for a new run. Raises UserError if `out` holds
    another run; CorruptStoreError if the checkpoint is damaged."""
    paths = checkpoints(out)
    if not paths:
        return None
    state = read(paths[-1])
    if state.record.digest != record.digest:
        raise UserError(
            f"{out} holds a run of another configuration or store ({state.record.difference(record)}); "
            "name another `out`, or delete that folder"
        )
    return state


def find_first_weights(student: StudentConfig, out: Path) -> FirstWeights:
    """Identify the weights that a student begins with. A file or folder that is gone is identified by the run in `out`,
    when that began with one of the same name. Raises ConfigError if there is no such file; UserError if `start_from`
    has no checkpoint; CorruptStoreError if a checkpoint is damaged."""
    start, pretrained = student.start_from, student.pretrained
    if start is not None or student.model.startswith(SCHEMES):
        sources = {"": str(start or student.model)}
    else:
        towers = {"": pretrained} if isinstance(pretrained, str) else dict(pretrained)
        sources = {f"{tower} " if tower else "": source for tower, source in towers.items() if source}
    places = {tower: Path(source.removeprefix("local-dir:")) for tower, source in sources.items()}
    files = {tower: place for tower, place in places.items() if place.is_absolute() or place.exists()}
    names = {tower: place.absolute().name if tower in files else sources[tower] for tower, place in places.items()}
    name = ", ".join(f"{tower}{named}" for tower, named in names.items()) or "random weights"
    if not all(place.exists() for place in files.values()) and (paths := checkpoints(out)):
        begun = read(paths[-1], tensors=False).record.first_weights
        if begun.name == name:
            return begun
    if start is not None:
        first = read(find_checkpoint(start), tensors=False)
        return FirstWeights(name=name, digest=f"{first.record.digest} at step {first.progress.step}")
    digests = [content_digest(files[tower]) if tower in files else source for tower, source in sources.items()]
    return FirstWeights(name=name, digest=", ".join(digests) if files else "")


def checkpoints(out: Path) -> list[Path]:
    """List the checkpoints of a run folder, oldest first."""
    return sorted((path for path in (out / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the steps done at a checkpoint, by its name."""
    return int(path.name.removeprefix("step-").removesuffix(".safetensors"))


def find_checkpoint(out: Path, which: str = "best") -> Path:
    """Find the checkpoint `best`, `last` or of a step. The last names the best, and is it where none was judged or the
    best is gone. Raises UserError if there is none; CorruptStoreError if the last one is damaged."""
    paths = {str(step_of(path)): path for path in checkpoints(out)}
    if not paths:
        reason = "has no checkpoint yet" if (out / CONFIG).is_file() else "is not a run folder"
        raise UserError(f"{out} {reason}; name the `out` of a `mmkd distill` run, which writes one every few steps")
    last = list(paths.values())[-1]
    if which == "best":
        return paths.get(str(read(last, tensors=False).progress.best_step), last)
    if which != "last" and which not in paths:
        steps = ", ".join(paths)
        raise UserError(f"{out} has no checkpoint {which!r}; expected best, last or one of its steps: {steps}")
    return paths.get(which, last)


def read(path: Path, *, tensors: bool = True) -> State:
    """Read a checkpoint, or its record and progress alone. Raises CorruptStoreError if the file is not whole."""
    errors = (SafetensorError, OSError, KeyError, ValueError, TypeError)
    with faults_as(CorruptStoreError, errors, f"{path} is damaged", "; delete it to go on from the one before"):
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["mmkd"])
            content = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
        return State(RunRecord.model_validate(header["record"]), Progress(**header["progress"]), content)


def load_student(config: StudentConfig, state: State | None) -> nn.Module:
    """Build the network with its first weights and the preprocessing that belongs to them; a run that goes on has its
    weights in `state`, and first weights are not read. Raises UserError if `start_from` has no checkpoint, or one of
    another network; otherwise as `build_student`."""
    student = build_student(config, first_weights=state is None)
    if state is not None:
        set_preprocessing(student, state.record.preprocess)
    elif config.start_from is not None:
        path = find_checkpoint(config.start_from)
        first = read(path)
        set_preprocessing(student, first.record.preprocess | config.preprocess.model_dump(exclude_none=True))
        fault = f"student.start_from: {path} holds another network than this student"
        with faults_as(UserError, RuntimeError, fault, "; name its `model`"):
            student.load_state_dict(student_weights(first))
    return student


def student_weights(state: State) -> dict[str, torch.Tensor]:
    """Return the student's weights, the averaged ones when the run averaged."""
    return state.part("average.student") or state.part("model.towers.student")


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Restore the moments of every parameter."""
    for owner, parameter in model.named_parameters():
        if moments := state.part(f"optimizer.{owner}"):
            # The fused optimizer needs moments in the memory layout of their parameter (channels last).
            value = parameter.detach()
            optimizer.state[parameter] = {
                name: torch.empty_like(value).copy_(moment) if moment.shape == value.shape else moment.to(value.device)
                for name, moment in moments.items()
            }
