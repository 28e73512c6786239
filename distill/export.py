"""A trained student as an ordinary open_clip folder: what `mmkd extract` and anyone else's open_clip can load."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file

from mmkd.distill.checkpoint import CONFIG, Progress, best_or_last, read, student_weights
from mmkd.distill.config import RunConfig
from mmkd.distill.student import build_student, model_config
from mmkd.store import FeatureStore
from mmkd.store.atomic import disk_errors
from mmkd.store.errors import UserError
from mmkd.store.yaml_config import validated


def export(run: Path, out: Path) -> Path:
    """Write the student of a finished or running run to `out`: its best checkpoint when it was judged, else the last.

    The folder holds `open_clip_config.json`, `open_clip_model.safetensors` and a model card, so that
    `open_clip.create_model_from_pretrained("local-dir:OUT")` loads it. The heads stay behind: they belong
    to the teachers' spaces.

    Raises:
        UserError: `run` is not a run folder, has no checkpoint yet, or `out` holds something else.
    """
    config_path = run / CONFIG
    if not config_path.is_file():
        raise UserError(f"{run} is not a run folder: no {CONFIG}; name the `out` of a `mmkd distill` run")
    config = validated(RunConfig, json.loads(config_path.read_text()), config_path).model_copy(update={"out": run})
    _, state = read(best_or_last(run))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder for the exported student")
    student = build_student(config.student)
    weights = student_weights(state)
    student.load_state_dict(weights)
    description = model_config(config.student.model)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, out / "open_clip_model.safetensors")
        save_config_for_hf(student, out / "open_clip_config.json", model_config=description)
        if "hf_tokenizer_name" in description["text_cfg"]:
            open_clip.get_tokenizer(config.student.model).save_pretrained(out)
        (out / "README.md").write_text(_model_card(config, state.progress, student))
    return out


def _model_card(config: RunConfig, progress: Progress, student: torch.nn.Module) -> str:
    store = FeatureStore.open(config.store)
    corpus = store.record.corpus
    slugs = config.teachers or tuple(store.teachers)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    teachers = "\n".join(
        f"| {card.slug} | {card.source} | {card.digest} | {card.licence} |" for card in map(store.card, slugs)
    )
    return f"""---
library_name: open_clip
---
# Student distilled by mmkd

{config.student.model}, {parameters / 1e6:.1f} M parameters, {progress.step} steps of {config.batch_size} pairs.
Load it with `open_clip.create_model_from_pretrained("local-dir:<this folder>")` and call `.eval()`.

Features came from `{store.root.name}` ({corpus.rows} rows, corpus digest {corpus.digest[:16]}).
A student may carry its teachers' conditions of use with it: read their licences.

| teacher | source | digest | licence |
|---|---|---|---|
{teachers}
"""
