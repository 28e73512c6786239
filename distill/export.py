"""A trained student as an ordinary open_clip folder, which open_clip and `mmkd extract` load: weights, model card, and
its towers as ONNX or TorchScript graphs, each compared with the student."""

import importlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mmkd.base.errors import UserError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors
from mmkd.base.install import import_extra
from mmkd.distill.checkpoint import State, find_checkpoint, read, student_weights
from mmkd.distill.config import StudentConfig
from mmkd.distill.provenance import TEXT, RunRecord
from mmkd.distill.student import (
    HF_NAMES,
    build_student,
    image_size,
    preprocessing,
    set_preprocessing,
    student_tokenizer,
)

GraphFormat = Literal["onnx", "torchscript"]
TOLERANCE = 1e-4
"""Largest difference from the student's features, as a share of their largest number: another order of float32 sums."""

# Protobuf, and with it one ONNX file, ends at 2 GiB; larger weights lie beside it.
_ONE_FILE_BYTES = 2**30
# Other batches than the one that was traced: a graph that remembers its batch fails at them.
_TRACED_ROWS, _CHECKED_ROWS = 2, (1, 3)
Encode = Callable[[torch.Tensor], torch.Tensor]

PROVENANCE = "mmkd_run.json"
# Captions of many lengths, for graphs that are traced with them.
_WORDS = ("", "a chest radiograph", "axial CT of the abdomen with contrast, portal venous phase; " * 8)


def export(run: Path, out: Path, graphs: Sequence[GraphFormat] = (), checkpoint: str = "best") -> Path:
    """Write the student of a finished or running run to `out`. The folder holds `open_clip_config.json`,
    `open_clip_model.safetensors`, the tokenizer where open_clip wants one, a model card that says how open_clip loads
    it, and `mmkd_run.json` with the card's content for programs. Averaged weights are taken when the run averaged;
    heads are left out. Only the checkpoint is read: store, YAML and first weights are no longer needed. `run`: the
    `out` of a training run; `checkpoint`: `best` (the last where none was judged), `last`, or a step. Raises UserError
    if there is no such checkpoint, or `out` is not empty, or as `write_graphs`; CorruptStoreError if it is damaged."""
    check_packages(graphs)
    state = read(find_checkpoint(run, checkpoint))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder for the exported student")
    record, weights = state.record, student_weights(state)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, and renamed when it is whole.
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=TEMPORARY_SUFFIX) as folder:
            # open_clip knows a network by the name of its file, in training as here.
            network, description = Path(folder) / f"{Path(record.model).name}.json", deepcopy(record.network)
            text_files = run / TEXT
            if text_files.is_dir():
                shutil.copytree(text_files, folder, dirs_exist_ok=True)
                description["text_cfg"] |= {name: "." for name in HF_NAMES if name in description["text_cfg"]}
            elif "." in (description["text_cfg"].get(name) for name in HF_NAMES):
                raise UserError(f"{run} has no folder {TEXT}/ with its student's tokenizer; copy the whole run folder")
            network.write_text(json.dumps(description))
            student = build_student(StudentConfig(model=str(network)), first_weights=False)
            set_preprocessing(student, record.preprocess)
            student.load_state_dict(weights)
            facts = describe(state, sum(parameter.numel() for parameter in student.parameters()))
            new = Path(folder) / "student"
            new.mkdir()
            contiguous = {name: value.contiguous() for name, value in weights.items()}
            save_file(contiguous, new / "open_clip_model.safetensors")
            save_config_for_hf(student, new / "open_clip_config.json", model_config=record.network)
            if text_files.is_dir():
                shutil.copytree(text_files, new, dirs_exist_ok=True)
            (new / "README.md").write_text(model_card(facts, record))
            for kind in graphs:
                # Pictures of noise, float32 (3, 3, H, W).
                transform, side = image_transform_v2(preprocessing(student), is_train=False), max(image_size(student))
                noise = [Image.effect_noise((side, side), 40 * n).convert("RGB") for n in (1, 2, 3)]
                images, tokens = torch.stack([*map(transform, noise)]), student_tokenizer(str(network))(list(_WORDS))
                facts[kind] = write_graphs(student, images, tokens, kind, new / kind)
            (new / PROVENANCE).write_text(json.dumps(facts, indent=1))
            new.replace(out)
    return out


def describe(state: State, parameters: int) -> dict[str, Any]:
    """Describe an exported checkpoint of a student of so many parameters, as JSON: record, identities, scores."""
    record, progress = state.record, state.progress
    return {
        "run": record.digest,
        "network": record.model,
        "parameters": parameters,
        "steps": progress.step,
        "best_step": progress.best_step,
        "metric": progress.judge.partition(" ")[0],
        "scores": progress.best_scores if progress.best_step == progress.step else {},
        "load": loading_code(record.network),
        **record.model_dump(mode="json", exclude={"network", "model"}),
    }


def loading_code(network: dict[str, Any]) -> str:
    """Return the Python statements that load an exported student from its `folder`. Where the text tower is of a local
    folder, open_clip would look for its configuration in the working folder, so it is told the place."""
    if network["text_cfg"].get("hf_model_name") != ".":
        return 'model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")'
    return """text = json.load(open(f"{folder}/open_clip_config.json"))["model_cfg"]["text_cfg"]
text |= {"hf_model_name": folder, "hf_model_pretrained": False}
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}", text_cfg=text)"""


def model_card(facts: dict[str, Any], record: RunRecord) -> str:
    """Return README.md of the folder, Markdown."""
    config, source = record.config, record.source
    chosen = f", selection `{config['selection']}` (digest {source.selection[:16]})" if source.selection else ""
    decay = config["optimizer"]["average"]
    average = f", weights averaged with decay {decay}" if decay else ""
    return f"""---
library_name: open_clip
---
# Student distilled by mmkd

{facts["network"]}, {facts["parameters"]:,} parameters, {facts["steps"]:,} steps of {config["batch_size"]} \
pairs{average}. It began with {record.first_weights.name}.

```python
import json, open_clip
folder = "student"  # this one
{facts["load"]}
model.eval()
tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}")
```

{_scores(facts)}

Features came from `{source.store}`: {source.rows:,} rows, store digest {source.store_digest[:16]}, corpus digest \
{", ".join(digest[:16] for digest in source.corpora)}; rows used: {config["where"] or "all rows"}{chosen}.
Run digest {facts["run"]}; `mmkd_run.json` has the whole configuration.
A student may carry its teachers' conditions of use with it: read their licenses.

{_teachers(record)}
"""


def _scores(facts: dict[str, Any]) -> str:
    best, scores = facts["best_step"], facts["scores"]
    if best is None:
        return "It was not judged during training."
    if not scores:
        return f"This is not the checkpoint that validation chose: by {facts['metric']} that was step {best:,}."
    table = "\n".join(f"| {_cell(name)} | {score:.4f} |" for name, score in scores.items())
    return (
        f"Scores on held-out rows during training, at step {best}. {facts['metric']} chose this checkpoint, so they "
        f"are no measure of it: use `mmkd evaluate`.\n\n| set and metric | score |\n|---|---|\n{table}"
    )


def _teachers(record: RunRecord) -> str:
    if not record.source.teachers:
        return "No teacher took part."
    lines = "\n".join(
        f"| {_cell(t.slug)} | {_cell(t.source)} | {t.digest} | {_cell(t.license)} |" for t in record.source.teachers
    )
    return f"| teacher | source | digest | license |\n|---|---|---|---|\n{lines}"


def _cell(text: str) -> str:
    """Return text that cannot break out of a table's cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


class _Tower(nn.Module):
    def __init__(self, encode: Encode, student: nn.Module) -> None:
        super().__init__()
        self.student, self.encode = student, encode

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.encode(inputs)


def write_graphs(
    student: nn.Module, images: torch.Tensor, tokens: torch.Tensor, kind: GraphFormat, folder: Path
) -> dict[str, float]:
    """Write the towers of an open_clip model into `folder` as graphs that run without open_clip. `image` takes pixels
    float32 (B, 3, H, W), resized and normalized as `preprocess_cfg` in `open_clip_config.json` says; `text` takes
    tokens int64 (B, L), padded to the context. Both give features float32 (B, D), not normalized, for any B. They are
    traced and compared with `images` (3, 3, H, W) and `tokens` (3, L); the student is set to evaluation. Returns each
    tower's largest difference as a share. Raises UserError if a graph gives other features; it is then deleted."""
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
        import_extra(package, "onnx", "an ONNX graph")


def _write_onnx(tower: nn.Module, inputs: torch.Tensor, path: Path) -> Encode:
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


def _write_torchscript(tower: nn.Module, inputs: torch.Tensor, path: Path) -> Encode:
    torch.jit.trace(tower, (inputs,), check_trace=False).save(path)  # type: ignore[no-untyped-call]
    return torch.jit.load(path)  # type: ignore[no-untyped-call]
