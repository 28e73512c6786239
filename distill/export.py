"""A trained student as an ordinary open_clip folder: what `mmkd extract` and anyone else's open_clip can load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mmkd.base.config import validated
from mmkd.base.errors import UserError
from mmkd.base.files import disk_errors
from mmkd.distill.checkpoint import best_or_last, read, student_weights
from mmkd.distill.config import RunConfig
from mmkd.distill.graphs import GraphFormat, check_packages, write_graphs
from mmkd.distill.model_card import model_card, provenance
from mmkd.distill.provenance import CONFIG, SOURCE, RunSource
from mmkd.distill.student import build_student, image_side, model_config, preprocessing, student_tokenizer

PROVENANCE = "mmkd_run.json"
# Captions of many lengths, for graphs that are traced with them.
_WORDS = ("", "a chest radiograph", "axial CT of the abdomen with contrast, portal venous phase; " * 8)


def export(run: Path, out: Path, graphs: Sequence[GraphFormat] = ()) -> Path:
    """Write the student of a finished or running run to `out`: its best checkpoint when it was judged, else the last.

    The folder holds `open_clip_config.json`, `open_clip_model.safetensors`, the tokenizer where open_clip wants one,
    a model card, and `mmkd_run.json` with what the card says, for programs. `open_clip.create_model_from_pretrained(
    "local-dir:OUT")` loads it. Averaged weights are taken when the run averaged. The heads stay behind: they belong to
    the teachers' spaces. `graphs` adds `onnx/` or `torchscript/`, see `mmkd.distill.graphs`. The store is not needed.

    Raises:
        UserError: `run` is not a run folder, has no checkpoint yet, or `out` holds something else; or see `graphs.py`.
        CorruptStoreError: the checkpoint is damaged.
    """
    check_packages(graphs)
    config = validated(RunConfig, _written(run, CONFIG), run / CONFIG)
    source = validated(RunSource, _written(run, SOURCE), run / SOURCE)
    digest, state = read(best_or_last(run))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder for the exported student")
    student = build_student(config.student, first_weights=False)
    weights = student_weights(state)
    student.load_state_dict(weights)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    facts = provenance(config, source, digest, state.progress, parameters)
    description = model_config(config.student.model)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, out / "open_clip_model.safetensors")
        save_config_for_hf(student, out / "open_clip_config.json", model_config=description)
        if "hf_tokenizer_name" in description["text_cfg"]:
            student_tokenizer(config.student).save_pretrained(out)  # type: ignore[attr-defined]
        (out / PROVENANCE).write_text(json.dumps(facts, indent=1))
        (out / "README.md").write_text(model_card(facts, source))
        for kind in graphs:
            images, tokens = _examples(student), student_tokenizer(config.student)(list(_WORDS))
            facts[kind] = write_graphs(student, images, tokens, kind, out / kind)
            (out / PROVENANCE).write_text(json.dumps(facts, indent=1))
    return out


def _written(run: Path, name: str) -> dict[str, Any]:
    path = run / name
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: no {name}; name the `out` of a `mmkd distill` run")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _examples(student: nn.Module) -> torch.Tensor:
    """Three noisy pictures as the student sees pictures, float32 (3, 3, H, W)."""
    transform = image_transform_v2(preprocessing(student), is_train=False)
    side = image_side(student)
    return torch.stack([transform(Image.effect_noise((side, side), 40 * n).convert("RGB")) for n in (1, 2, 3)])
