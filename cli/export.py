"""`mmkd export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False), metavar="RUN_DIR")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def export(run: Path, out: Path) -> None:
    """Write the student of RUN_DIR to OUT as an open_clip folder.

    \b
    mmkd export runs/first student
    mmkd extract eval.csv eval-store --teachers student=local-dir:student
    """
    from mmkd.distill.export import export as write

    folder = write(run, out)
    click.echo(f"{folder} loads with open_clip.create_model_from_pretrained('local-dir:{folder}')")
