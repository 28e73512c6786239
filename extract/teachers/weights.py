"""Reading weights without running code, and putting them into a model with nothing left over."""

import logging
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mmkd.base.errors import TeacherError, faults_as
from mmkd.extract.teachers.source import file_sha256
from mmkd.store.hierarchy import canonical_sha256

log = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]

SAFETENSORS = ".safetensors"
_ZIP = b"PK"
TEMPERATURE = "logit_scale"
BARE_TENSOR = "tensor"
"""Name given to the content of a file that holds one tensor and no name."""
PUBLISHED_SHA256 = "mmkd_published_sha256"
"""Metadata of a converted file: hash of the file it was made from, so that converting keeps the teacher's identity."""
PAYLOAD_SHA256 = "mmkd_payload_sha256"
"""Metadata of a converted file: hash of everything after its header, so that the line above can be believed."""


def read_weights(*paths: Path, trust_pickle: bool = False) -> StateDict:
    """Read one file or all shards in float32 (half-precision weights widen exactly, integers stay). Raises TeacherError
    as `read_tensors`, and for weights quantized to 8-bit integers, whose scales no loader applies."""
    weights: StateDict = {}
    for path in paths:
        tensors = read_tensors(path, trust_pickle)
        eight_bit = [name for name, tensor in tensors.items() if tensor.dtype in (torch.int8, torch.uint8)]
        if quantized := [name for name in eight_bit if name.endswith("weight")]:
            raise TeacherError(
                f"{path} holds 8-bit integers for {quantized[0]} and {len(quantized) - 1} more tensors: mmkd reads no "
                "quantized weights; take the float weights"
            )
        weights |= {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return weights


def read_tensors(path: Path, trust_pickle: bool = False) -> StateDict:
    """Read a checkpoint: safetensors, or a torch file of tensors and plain values. A training checkpoint is unwrapped
    (`state_dict`), the prefix of DataParallel (`module.`) or torch.compile (`_orig_mod.`) dropped; a bare tensor is
    `BARE_TENSOR`. Raises TeacherError if it is damaged, no checkpoint, or a pickle that needs `trust_pickle`."""
    content = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_torch(path, trust_pickle)
    if isinstance(content, torch.Tensor):
        return {BARE_TENSOR: content}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise TeacherError(
            f"{path} holds no tensors by name (found {type(content).__name__}): it is not a checkpoint of weights"
        )
    if not content:
        raise TeacherError(f"{path} holds no tensors at all; download it again")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return dict(content)


def _read_safetensors(path: Path, only: str | None = None) -> StateDict:
    with _whole(path, SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if only in (None, name)}  # noqa: SIM118


def _read_torch(path: Path, trust_pickle: bool) -> Any:
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise TeacherError(
            f"{path} is a TorchScript program, not weights alone; save its weights with "
            "torch.save(torch.jit.load(PROGRAM).state_dict(), FILE)"
        )
    try:
        return _load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch files begin as a zip archive or as the older bare pickle.
        if not _begins_with(path, _ZIP, b"\x80") or "Weights only load failed" not in str(error):
            with _whole(path, pickle.UnpicklingError):
                raise
        if not trust_pickle:
            raise TeacherError(
                f"{path} needs Python's unpickler, which can run any code; if its sha256 {file_sha256(path)} "
                "is the one that its authors published, make a safe copy with `mmkd teachers convert --trust-pickle`, "
                "or write `trust_pickle: true` into the teacher's YAML card"
            ) from error
    log.warning("unpickling %s, sha256 %s, as its owner asked", path, file_sha256(path))
    with _whole(path, AttributeError, ImportError, pickle.UnpicklingError):
        return _load(path, weights_only=False)


def _load(path: Path, weights_only: bool) -> Any:
    with _whole(path, RuntimeError, EOFError, ValueError, KeyError, OSError):
        # A mapped file costs no memory for what is left out (optimizer state is often twice the weights).
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=_begins_with(path, _ZIP))


def _whole(path: Path, *errors: type[Exception]) -> AbstractContextManager[None]:
    return faults_as(TeacherError, errors, f"{path} is truncated or corrupted", "; download it again")


def _begins_with(path: Path, *signatures: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(2).startswith(signatures)


def read_temperature(path: Path, trust_pickle: bool = False) -> float | None:
    """exp of the tensor `logit_scale` of a checkpoint; None where it has none. Reads no other tensor. Raises
    TeacherError as `read_weights`, so that damaged files are met before a run starts."""
    if path.suffix == SAFETENSORS:
        scale = _read_safetensors(path, only=TEMPERATURE).get(TEMPERATURE)
    else:
        scale = read_tensors(path, trust_pickle).get(TEMPERATURE)
    return None if scale is None or scale.numel() != 1 else float(scale.float().exp())


def weights_identity(named: Mapping[str, Path]) -> str:
    """Hash of the weights as published: of the file, or over name and hash of each where there are several. Raises
    TeacherError if a converted file was changed after its conversion."""
    hashes = {name: _published_sha256(path) for name, path in sorted(named.items())}
    return next(iter(hashes.values())) if len(hashes) == 1 else canonical_sha256(hashes)


def _published_sha256(path: Path) -> str:
    if path.suffix != SAFETENSORS:
        return file_sha256(path)
    header, metadata = safetensors_header(path)
    if (published := metadata.get(PUBLISHED_SHA256)) is None:
        return file_sha256(path)
    if file_sha256(path, skip=header) != metadata.get(PAYLOAD_SHA256):
        raise TeacherError(f"{path} was changed after `mmkd teachers convert` wrote it; convert the original again")
    return published


def safetensors_header(path: Path) -> tuple[int, dict[str, str]]:
    """Return bytes before the tensors begin, and the file's own metadata. Source: the format's description (8 bytes
    little-endian length, then JSON), https://huggingface.co/docs/safetensors."""
    with _whole(path, SafetensorError, OSError), safe_open(path, "pt") as tensors, path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little"), tensors.metadata() or {}


def load_strictly(model: nn.Module, weights: StateDict, where: str) -> None:
    """Put `weights` into `model`: every parameter is set, every tensor is used, every shape fits. Raises TeacherError
    naming every missing, unexpected and ill-shaped key."""
    if problems := misfits(model.state_dict(), weights):
        raise TeacherError(f"{where} does not fit this architecture: {problems}")
    model.load_state_dict(weights, strict=True)


def misfits(own: Mapping[str, torch.Tensor], weights: StateDict) -> str:
    """Return one line that names every key of `weights` that does not fit a model's `own`; empty when all do."""
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    return key_problems(missing=set(own) - set(weights), unexpected=set(weights) - set(own), shapes=shapes)


def key_problems(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]) -> str:
    """Return one line that names every key that does not fit; empty when all do."""
    groups = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": sorted(shapes)}
    return "; ".join(f"{len(names)} {kind} ({', '.join(names)})" for kind, names in groups.items() if names)
