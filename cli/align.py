"""`mmkd align`."""

import json
from pathlib import Path

import click

from mmkd.cli.params import FILE_PATH
from mmkd.store import FeatureStore


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("run", type=FILE_PATH, metavar="RUN.yaml")
@click.option("--json", "as_json", is_flag=True, help="Print the card with its scores as JSON.")
def align(store: str, run: Path, as_json: bool) -> None:
    """Map the teachers' spaces to one width and evaluate the result on held-out rows.

    \b
    out: phi-s.safetensors     # paths are relative to RUN.yaml
    method: {whitening: {}}    # or none, pca, procrustes, joint, autoencoder
    dim: 512
    """
    from mmkd.distill.alignment.config import load_align

    opened, config = FeatureStore.open(store), load_align(run)
    # After the configuration: a misspelled key is reported before the slow imports.
    from mmkd.distill.alignment import fit

    card = fit.align(opened, config).card
    if as_json:
        click.echo(card.model_dump_json(indent=1))
        return
    click.echo(
        f"{card.method} to width {card.dim or 'of each teacher'}, fitted on {card.rows:,} rows; "
        f"settings {json.dumps(card.settings)}"
    )
    click.echo("\n".join(fit.AlignmentScores.model_validate(card.scores).lines()))
    click.echo(f"written to {config.out}; train with it: `heads: {{alignment: {config.out}}}` in the run's YAML")
