"""A trained student as an ordinary open_clip folder: what `mmkd extract` and anyone else's open_clip can load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mmkd.base.errors import UserError
from mmkd.base.files import disk_errors
from mmkd.distill.checkpoint import State, find_checkpoint, read, student_weights
from mmkd.distill.config import StudentConfig
from mmkd.distill.graphs import GraphFormat, check_packages, write_graphs
from mmkd.distill.model_card import describe, model_card
from mmkd.distill.student import build_student, image_side, preprocessing, set_preprocessing, student_tokenizer

PROVENANCE = "mmkd_run.json"
# Captions of many lengths, for graphs that are traced with them.
_WORDS = ("", "a chest radiograph", "axial CT of the abdomen with contrast, portal venous phase; " * 8)


def export(run: Path, out: Path, graphs: Sequence[GraphFormat] = (), checkpoint: str = "best") -> Path:
    """Write the student of a finished or running run to `out`.

    The folder holds `open_clip_config.json`, `open_clip_model.safetensors`, the tokenizer where open_clip wants one,
    a model card, and `mmkd_run.json` with what the card says, for programs. `open_clip.create_model_from_pretrained(
    "local-dir:OUT")` loads it. Averaged weights are taken when the run averaged. The heads stay behind: they belong to
    the teachers' spaces. Nothing but the checkpoint is read: store, YAML and first weights may be gone.

    Args:
        run: the `out` of a training run.
        out: folder to write; new or empty.
        graphs: adds `onnx/` or `torchscript/`, see `mmkd.distill.graphs`.
        checkpoint: `best` (the last where none was judged), `last`, or a step.

    Raises:
        UserError: `run` has no such checkpoint, or `out` holds something else; or see `graphs.py`.
        CorruptStoreError: the checkpoint is damaged.
    """
    check_packages(graphs)
    state = read(find_checkpoint(run, checkpoint))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder for the exported student")
    record, weights = state.record, student_weights(state)
    with TemporaryDirectory() as folder:
        # open_clip knows a network by the name of its file, in training as here.
        network = Path(folder) / f"{record.model}.json"
        network.write_text(json.dumps(record.network))
        config = StudentConfig(model=str(network))
        student = _restored(config, state)
        facts = describe(state, sum(parameter.numel() for parameter in student.parameters()))
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            contiguous = {name: value.contiguous() for name, value in weights.items()}
            save_file(contiguous, out / "open_clip_model.safetensors")
            save_config_for_hf(student, out / "open_clip_config.json", model_config=record.network)
            if "hf_tokenizer_name" in record.network["text_cfg"]:
                student_tokenizer(config).save_pretrained(out)  # type: ignore[attr-defined]
            (out / "README.md").write_text(model_card(facts, record))
            (out / PROVENANCE).write_text(json.dumps(facts, indent=1))
            for kind in graphs:
                images, tokens = _examples(student), student_tokenizer(config)(list(_WORDS))
                facts[kind] = write_graphs(student, images, tokens, kind, out / kind)
                (out / PROVENANCE).write_text(json.dumps(facts, indent=1))
    return out


def _restored(config: StudentConfig, state: State) -> nn.Module:
    student = build_student(config, first_weights=False)
    set_preprocessing(student, state.record.preprocess)
    student.load_state_dict(student_weights(state))
    return student


def _examples(student: nn.Module) -> torch.Tensor:
    """Three noisy pictures as the student sees pictures, float32 (3, 3, H, W)."""
    transform = image_transform_v2(preprocessing(student), is_train=False)
    side = image_side(student)
    return torch.stack([transform(Image.effect_noise((side, side), 40 * n).convert("RGB")) for n in (1, 2, 3)])
