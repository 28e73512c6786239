"""Where an exported student comes from: as JSON for programs, and as a model card for people."""

from __future__ import annotations

from typing import Any

import open_clip
import torch

from mmkd.distill.checkpoint import Progress
from mmkd.distill.config import RunConfig
from mmkd.distill.provenance import RunSource

Facts = dict[str, Any]


def provenance(config: RunConfig, source: RunSource, run: str, progress: Progress, parameters: int) -> Facts:
    """Enough to find every file and every condition of use again; JSON.

    Args:
        config: of the run.
        source: what it learned from, noted when it began.
        run: its digest.
        progress: of the checkpoint that is exported.
        parameters: of the student.
    """
    began_with = config.student.start_from
    return {
        "run": run,
        "network": config.student.model,
        "parameters": parameters,
        "began_with": began_with.name if began_with is not None else config.student.pretrained or "random weights",
        "steps": progress.step,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "presets": list(config.preset),
        "averaged": config.optimiser.average,
        "source": source.model_dump(mode="json"),
        "where": config.where,
        "best_step": progress.best_step,
        "scores": progress.best_scores,
        # Without the folders of the machine that trained: the store is named above by what it holds.
        "config": config.model_dump(mode="json", exclude={"store": True, "out": True, "student": {"start_from"}}),
        "versions": {"open_clip": open_clip.__version__, "torch": str(torch.__version__)},
    }


def model_card(facts: Facts, source: RunSource) -> str:
    """README.md of the folder, Markdown."""
    chosen = (
        f", selection `{facts['config']['selection']}` (digest {source.selection[:16]})" if source.selection else ""
    )
    average = f", weights averaged with decay {facts['averaged']}" if facts["averaged"] else ""
    return f"""---
library_name: open_clip
---
# Student distilled by mmkd

{facts["network"]}, {facts["parameters"]:,} parameters, {facts["steps"]:,} steps of {facts["batch_size"]} \
pairs{average}. It began with {facts["began_with"]}. Load it with
`open_clip.create_model_from_pretrained("local-dir:<this folder>")` and call `.eval()`.

{_scores(facts)}

Features came from `{source.store}`: {source.rows:,} rows, store digest {source.store_digest[:16]}, corpus digest \
{", ".join(digest[:16] for digest in source.corpora)}; rows used: {facts["where"] or "all rows"}{chosen}.
Run digest {facts["run"]}; `mmkd_run.json` has the whole configuration.
A student may carry its teachers' conditions of use with it: read their licences.

{_teachers(source)}
"""


def _scores(facts: Facts) -> str:
    scores = facts["scores"]
    if not scores:
        return "It was not judged during training."
    table = "\n".join(f"| {_cell(name)} | {score:.4f} |" for name, score in scores.items())
    return (
        f"Scores on held-out rows during training, at step {facts['best_step']}. They chose this checkpoint, so they "
        f"are no measure of it: use `mmkd evaluate`.\n\n| set and metric | score |\n|---|---|\n{table}"
    )


def _teachers(source: RunSource) -> str:
    if not source.teachers:
        return "No teacher was asked."
    lines = "\n".join(
        f"| {_cell(t.slug)} | {_cell(t.source)} | {t.digest} | {_cell(t.licence)} |" for t in source.teachers
    )
    return f"| teacher | source | digest | licence |\n|---|---|---|---|\n{lines}"


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
