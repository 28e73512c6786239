"""`mmkd align`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.store import FeatureStore

if TYPE_CHECKING:
    from mmkd.distill.alignment.fit import AlignmentScores


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("run", type=click.Path(path_type=Path, dir_okay=False), metavar="RUN.yaml")
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
    click.echo(_screen(fit.AlignmentScores.model_validate(card.scores)))
    click.echo(f"written to {config.out}; train with it: `heads: {{alignment: {config.out}}}` in the run's YAML")


def _screen(scores: AlignmentScores) -> str:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    width = max((len(slug) for slug in scores.teachers), default=7)
    lines = [
        f"evaluated on {scores.rows:,} rows with held-out captions; recall at 1 of {scores.gallery:,.0f} on average",
        f"  image of one teacher to text of another   {percent(scores.image_to_text):>7}",
        f"  image of one teacher to image of another  {percent(scores.image_to_image):>7}",
        f"  image to text of the same teacher         {percent(scores.own_image_to_text):>7}",
        f"{'teacher':{width}}  {'rows':>8}  {'variance kept':>13}  {'neighbors kept':>15}  {'effective rank':>14}",
    ]
    lines += [
        f"{slug:{width}}  {one.rows:8,}  {percent(one.reconstruction):>13}  {percent(one.neighbors):>15}  "
        f"{one.effective_rank:14.1f}"
        for slug, one in scores.teachers.items()
    ]
    return "\n".join(lines)
