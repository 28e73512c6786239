"""`mmkd export`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.cli.params import FOLDER_PATH

if TYPE_CHECKING:
    from mmkd.distill.export import GraphFormat


@click.command()
@click.argument("run", type=FOLDER_PATH, metavar="RUN_DIR")
@click.argument("out", type=FOLDER_PATH)
@click.option(
    "--checkpoint",
    default="best",
    metavar="best|last|STEP",
    help="The best by validation (the last if there was none), the last, or that of a step.",
)
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    type=click.Choice(["onnx", "torchscript"]),
    help="Also the two towers as graphs that need no open_clip, run and compared with the student. May be repeated.",
)
def export(run: Path, out: Path, checkpoint: str, graphs: tuple["GraphFormat", ...]) -> None:
    """Write the student of RUN_DIR to OUT as an open_clip folder.

    \b
    mmkd export runs/first student
    mmkd export runs/first student --graph onnx
    mmkd export runs/first student --checkpoint last
    mmkd extract eval.csv eval-store --teachers student=local-dir:student
    """
    from mmkd.distill.export import PROVENANCE
    from mmkd.distill.export import export as write

    folder = write(run, out, graphs, checkpoint)
    facts = json.loads((folder / PROVENANCE).read_text())
    if "\n" in facts["load"]:
        click.echo(f"{folder} loads in open_clip as {folder / 'README.md'} says")
    else:
        click.echo(f"{folder} loads with open_clip.create_model_from_pretrained('local-dir:{folder}')")
    for kind in graphs:
        image, text = (facts[kind][tower] for tower in ("image", "text"))
        click.echo(f"{folder / kind}: image and text tower, {image:.1g} and {text:.1g} of the largest number off")
