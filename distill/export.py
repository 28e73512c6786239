"""A trained student as an ordinary open_clip folder: what `mmkd extract` and anyone else's open_clip can load."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from torch import nn

from mmkd.distill.checkpoint import CONFIG, Progress, best_or_last, read, student_weights
from mmkd.distill.config import RunConfig
from mmkd.distill.student import build_student, model_config
from mmkd.store import FeatureStore
from mmkd.store.atomic import disk_errors
from mmkd.store.errors import UserError
from mmkd.store.yaml_config import validated

PROVENANCE = "mmkd_run.json"


def export(run: Path, out: Path) -> Path:
    """Write the student of a finished or running run to `out`: its best checkpoint when it was judged, else the last.

    The folder holds `open_clip_config.json`, `open_clip_model.safetensors`, the tokenizer where open_clip wants one,
    a model card, and `mmkd_run.json` with what the card says, for programs. `open_clip.create_model_from_pretrained(
    "local-dir:OUT")` loads it. Averaged weights are taken when the run averaged. The heads stay behind: they belong to
    the teachers' spaces.

    Raises:
        UserError: `run` is not a run folder, has no checkpoint yet, or `out` holds something else.
        CorruptStoreError: the checkpoint is damaged.
    """
    config_path = run / CONFIG
    if not config_path.is_file():
        raise UserError(f"{run} is not a run folder: no {CONFIG}; name the `out` of a `mmkd distill` run")
    config = validated(RunConfig, json.loads(config_path.read_text()), config_path).model_copy(update={"out": run})
    path = best_or_last(run)
    digest, state = read(path)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder for the exported student")
    student = build_student(config.student)
    weights = student_weights(state)
    student.load_state_dict(weights)
    description = model_config(config.student.model)
    provenance = _provenance(config, digest, state.progress, student)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, out / "open_clip_model.safetensors")
        save_config_for_hf(student, out / "open_clip_config.json", model_config=description)
        if "hf_tokenizer_name" in description["text_cfg"]:
            open_clip.get_tokenizer(config.student.model).save_pretrained(out)
        (out / PROVENANCE).write_text(json.dumps(provenance, indent=1))
        (out / "README.md").write_text(_model_card(provenance))
    return out


def _provenance(config: RunConfig, digest: str, progress: Progress, student: nn.Module) -> dict[str, object]:
    """Where the student comes from, as JSON: enough to find every file and every condition of use again."""
    store = FeatureStore.open(config.store)
    corpora = [span.corpus for span in store.record.spans()]
    began_with = config.student.start_from
    asked = bool(config.loss.teacher_terms)
    cards = [store.card(slug) for slug in (config.teachers or tuple(store.teachers))] if asked else []
    return {
        "run": digest,
        "network": config.student.model,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "began_with": began_with.name if began_with is not None else config.student.pretrained or "random weights",
        "steps": progress.step,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "presets": list(config.preset),
        "averaged": config.optimiser.average,
        "store": store.root.name,
        "corpus_rows": sum(corpus.rows for corpus in corpora),
        "corpus_digest": ", ".join(corpus.digest[:16] for corpus in corpora),
        "where": config.where,
        "metric": config.monitor.metric or None,
        "best_score": progress.best_score,
        "best_step": progress.best_step,
        "teachers": [
            {"slug": card.slug, "source": card.source, "digest": card.digest, "licence": card.licence} for card in cards
        ],
        # Without the folders of the machine that trained: the store is named above by what it holds.
        "config": config.model_dump(mode="json", exclude={"store": True, "out": True, "student": {"start_from"}}),
        "versions": {"open_clip": open_clip.__version__, "torch": str(torch.__version__)},
    }


def _model_card(facts: dict[str, object]) -> str:
    teachers = facts["teachers"]
    assert isinstance(teachers, list)
    lines = "\n".join(
        f"| {_cell(t['slug'])} | {_cell(t['source'])} | {t['digest']} | {_cell(t['licence'])} |" for t in teachers
    )
    table = f"| teacher | source | digest | licence |\n|---|---|---|---|\n{lines}" if lines else "No teacher was asked."
    rows = facts["where"] or "all rows"
    average = f", weights averaged with decay {facts['averaged']}" if facts["averaged"] else ""
    score = (
        f"Best score on held-out rows during training: {facts['best_score']:.4f} at step {facts['best_step']}. "
        "It chose this checkpoint, so it is no measure of it: use `mmkd evaluate`."
        if facts["best_score"] is not None
        else "It was not judged during training."
    )
    return f"""---
library_name: open_clip
---
# Student distilled by mmkd

{facts["network"]}, {facts["parameters"]:,} parameters, {facts["steps"]:,} steps of {facts["batch_size"]} \
pairs{average}. It began with {facts["began_with"]}. Load it with
`open_clip.create_model_from_pretrained("local-dir:<this folder>")` and call `.eval()`.

{score}

Features came from `{facts["store"]}` ({facts["corpus_rows"]:,} rows, corpus digest \
{facts["corpus_digest"]}), rows used: {rows}. Run digest {facts["run"]}.
A student may carry its teachers' conditions of use with it: read their licences.

{table}
"""


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
