"""`mmkd demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), default="mmkd-demo", metavar="[DIR]")
def demo(directory: Path) -> None:
    """The whole path on real images, on a CPU, without network: corpus, nine teachers, store, student, scores.

    Everything lies in DIR afterwards (mmkd-demo when not given). Running it again goes on where it stopped.
    Needs `pip install 'mmkd[demo]'`.
    """
    from mmkd.cli.demo.run import run_demo

    run_demo(directory, say=click.echo)
