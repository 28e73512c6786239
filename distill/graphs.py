"""A student's towers as graphs that run without open_clip, ONNX or TorchScript, each held against the student.

Two files per format: `image` takes pixels float32 (B, 3, H, W), resized and normalized as `preprocess_cfg` in
`open_clip_config.json` says; `text` takes tokens int64 (B, L), padded to the context. Both give features float32 (B,
D), not normalized, for any B.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mmkd.base.errors import UserError
from mmkd.base.install import install_command

GraphFormat = Literal["onnx", "torchscript"]
SUFFIX: dict[GraphFormat, str] = {"onnx": ".onnx", "torchscript": ".pt"}
TOLERANCE = 1e-4
"""Largest difference from the student's features, as a share of their largest number: another order of float32 sums."""

# Protobuf, and with it one ONNX file, ends at 2 GiB; larger weights lie beside it.
_ONE_FILE_BYTES = 2**30
# Other batches than the one that was traced: a graph that remembers its batch fails at them.
_TRACED_ROWS, _CHECKED_ROWS = 2, (1, 3)


class _Tower(nn.Module):
    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], student: nn.Module) -> None:
        super().__init__()
        self.student, self.encode = student, encode

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.encode(inputs)


def write_graphs(
    student: nn.Module, images: torch.Tensor, tokens: torch.Tensor, kind: GraphFormat, folder: Path
) -> dict[str, float]:
    """Write `image` and `text` into `folder` and run them; each tower's largest difference as a share. Raises UserError
    if a graph gives other features than the student; it is then deleted.

    Args:
        student: an open_clip model; set to evaluation mode.
        images: float32 (3, 3, H, W), what the graphs are traced and tried with. tokens: int64 (3, L), the same.
        kind: of graph.
        folder: made when it is not there.
    """
    student.eval()
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, encode, inputs in (
        ("image", student.encode_image, images),
        ("text", student.encode_text, tokens),
    ):
        path = folder / f"{name}{SUFFIX[kind]}"
        tower = _Tower(encode, student).eval()  # type: ignore[arg-type]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: what it may have lost is measured below
            (_write_onnx if kind == "onnx" else _write_torchscript)(tower, inputs[:_TRACED_ROWS], path)
            run = _run_onnx(path) if kind == "onnx" else _run_torchscript(path)
            found[name] = max(_difference(run, tower, inputs[:rows]) for rows in _CHECKED_ROWS)
        if not found[name] <= TOLERANCE:
            for file in folder.glob(f"{name}{SUFFIX[kind]}*"):
                file.unlink()
            raise UserError(
                f"the {kind} graph of the {name} tower differs from the student by {found[name]:.2g} of its largest "
                f"number, more than {TOLERANCE:g}, and was deleted; the open_clip folder is whole without it"
            )
    return found


def _difference(run: Callable[[torch.Tensor], torch.Tensor], tower: nn.Module, inputs: torch.Tensor) -> float:
    expected = tower(inputs)
    return float((run(inputs) - expected).abs().max() / expected.abs().max())


def check_packages(kinds: Sequence[GraphFormat]) -> None:
    """Before anything is written. Raises UserError if a package that ONNX needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime") if "onnx" in kinds else ():
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(f"ONNX graphs need the package {package}; {install_command('onnx')}") from error


def _write_onnx(tower: nn.Module, inputs: torch.Tensor, path: Path) -> None:
    size = sum(parameter.nbytes for parameter in tower.parameters())
    torch.onnx.export(
        tower,
        (inputs,),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixels" if inputs.is_floating_point() else "tokens"],
        output_names=["features"],
        external_data=size > _ONE_FILE_BYTES,
        verbose=False,
    )


def _run_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda inputs: torch.from_numpy(session.run(None, {entry.name: inputs.numpy()})[0])


def _write_torchscript(tower: nn.Module, inputs: torch.Tensor, path: Path) -> None:
    torch.jit.trace(tower, (inputs,), check_trace=False).save(path)  # type: ignore[no-untyped-call]


def _run_torchscript(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    loaded: Callable[[torch.Tensor], torch.Tensor] = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return loaded
