"""What is said of an exported student: as JSON for programs, and as a model card for people."""

from __future__ import annotations

from typing import Any

from mmkd.distill.checkpoint import State
from mmkd.distill.provenance import RunRecord


def describe(state: State, parameters: int) -> dict[str, Any]:
    """Enough to find every file and every condition of use again, as JSON, by the checkpoint alone.

    Args:
        state: the checkpoint that is exported.
        parameters: of the student.
    """
    record, progress = state.record, state.progress
    return {
        "run": record.digest,
        "network": record.model,
        "parameters": parameters,
        "steps": progress.step,
        "best_step": progress.best_step,
        "metric": progress.judge.partition(" ")[0],
        "scores": progress.best_scores if progress.best_step == progress.step else {},
        **record.model_dump(mode="json", exclude={"network", "model"}),
    }


def model_card(facts: dict[str, Any], record: RunRecord) -> str:
    """README.md of the folder, Markdown."""
    config, source = record.config, record.source
    chosen = f", selection `{config['selection']}` (digest {source.selection[:16]})" if source.selection else ""
    decay = config["optimiser"]["average"]
    average = f", weights averaged with decay {decay}" if decay else ""
    return f"""---
library_name: open_clip
---
# Student distilled by mmkd

{facts["network"]}, {facts["parameters"]:,} parameters, {facts["steps"]:,} steps of {config["batch_size"]} \
pairs{average}. It began with {record.first_weights.name}. Load it with
`open_clip.create_model_from_pretrained("local-dir:<this folder>")` and call `.eval()`.

{_scores(facts)}

Features came from `{source.store}`: {source.rows:,} rows, store digest {source.store_digest[:16]}, corpus digest \
{", ".join(digest[:16] for digest in source.corpora)}; rows used: {config["where"] or "all rows"}{chosen}.
Run digest {facts["run"]}; `mmkd_run.json` has the whole configuration.
A student may carry its teachers' conditions of use with it: read their licences.

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
        f"| {_cell(t.slug)} | {_cell(t.source)} | {t.digest} | {_cell(t.licence)} |" for t in record.source.teachers
    )
    return f"| teacher | source | digest | licence |\n|---|---|---|---|\n{lines}"


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
