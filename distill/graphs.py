"""A student's towers as graphs that run without open_clip, ONNX or TorchScript, each compared with the student.

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
TOLERANCE = 1e-4
"""Largest difference from the student's features, as a share of their largest number: another order of float32 sums."""

# Protobuf, and with it one ONNX file, ends at 2 GiB; larger weights lie beside it.
_ONE_FILE_BYTES = 2**30
# Other batches than the one that was traced: a graph that remembers its batch fails at them.
_TRACED_ROWS, _CHECKED_ROWS = 2, (1, 3)
Run = Callable[[torch.Tensor], torch.Tensor]


class _Tower(nn.Module):
    def __init__(self, encode: Run, student: nn.Module) -> None:
        super().__init__()
        self.student, self.encode = student, encode

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.encode(inputs)


def write_graphs(
    student: nn.Module, images: torch.Tensor, tokens: torch.Tensor, kind: GraphFormat, folder: Path
) -> dict[str, float]:
    """Write `image` and `text` of an open_clip model into `folder`, and run them. They are traced and tried with images
    float32 (3, 3, H, W) and tokens int64 (3, L); the student is set to evaluation. Returns each tower's largest
    difference as a share. Raises UserError if a graph gives other features than the student; it is then deleted."""
    student.eval()
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, encode, inputs in (("image", student.encode_image, images), ("text", student.encode_text, tokens)):
        path = folder / f"{name}.{'onnx' if kind == 'onnx' else 'pt'}"
        tower = _Tower(encode, student).eval()  # type: ignore[arg-type]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: what it may have lost is measured below
            run = (_write_onnx if kind == "onnx" else _write_torchscript)(tower, inputs[:_TRACED_ROWS], path)
            checked = [inputs[:rows] for rows in _CHECKED_ROWS]
            found[name] = max(float((run(x) - tower(x)).abs().max() / tower(x).abs().max()) for x in checked)
        if not found[name] <= TOLERANCE:
            for file in folder.glob(f"{path.name}*"):
                file.unlink()
            raise UserError(
                f"the {kind} graph of the {name} tower differs from the student by {found[name]:.2g} of its largest "
                f"number, more than {TOLERANCE:g}, and was deleted; the open_clip folder is whole without it"
            )
    return found


def check_packages(kinds: Sequence[GraphFormat]) -> None:
    """Raise UserError if a package that ONNX needs is missing, before anything is written."""
    for package in ("onnx", "onnxscript", "onnxruntime") if "onnx" in kinds else ():
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(f"ONNX graphs need the package {package}; {install_command('onnx')}") from error


def _write_onnx(tower: nn.Module, inputs: torch.Tensor, path: Path) -> Run:
    torch.onnx.export(
        tower,
        (inputs,),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixels" if inputs.is_floating_point() else "tokens"],
        output_names=["features"],
        external_data=sum(parameter.nbytes for parameter in tower.parameters()) > _ONE_FILE_BYTES,
        verbose=False,
    )
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda inputs: torch.from_numpy(session.run(None, {entry.name: inputs.numpy()})[0])


def _write_torchscript(tower: nn.Module, inputs: torch.Tensor, path: Path) -> Run:
    torch.jit.trace(tower, (inputs,), check_trace=False).save(path)  # type: ignore[no-untyped-call]
    loaded: Run = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return loaded
