"""`mmkd extract`."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("corpus")
@click.argument("store", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--teachers", default="all", show_default=True, help="all, or a,b, or NAME=local-dir:FOLDER, comma between."
)
@click.option("--scheduler", default="local", show_default=True, help="local, or the address of a Dask scheduler.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes of the local cluster.  [default: one per core]")
@click.option(
    "--keep-inputs", type=click.IntRange(min=1), metavar="PIXELS", help="Keep JPEGs of this shorter side for training."
)
@click.option("--trust-pickle", is_flag=True, help="Unpickle weights that need it; they can run any code.")
def extract(
    corpus: str,
    store: Path,
    teachers: str,
    scheduler: str,
    workers: int | None,
    keep_inputs: int | None,
    trust_pickle: bool,
) -> None:
    """Run teachers over CORPUS and keep their features in STORE.

    CORPUS is a CSV, TSV or JSONL file with an image folder beside it, a WebDataset tar or a folder of
    them, or a corpus.yaml. Running the same command again does what is left; a bad image or caption
    costs its own row only.

    \b
    mmkd extract pairs.csv features/ --teachers biomedclip,plip
    mmkd extract shards/ features/ --teachers mine=local-dir:models/mine
    """
    from mmkd.extract.config import ExtractConfig
    from mmkd.extract.run import extract as run
    from mmkd.extract.run import summary_lines
    from mmkd.extract.teachers import parse_teachers

    specs = tuple(spec.model_copy(update={"trust_pickle": trust_pickle}) for spec in parse_teachers(teachers))
    config = ExtractConfig(
        corpus=corpus, store=store, teachers=specs, scheduler=scheduler, workers=workers, keep_inputs=keep_inputs
    )
    report = run(config, say=click.echo)
    for line in summary_lines(report):
        click.echo(line)
    if report.lost_shards:
        sys.exit(1)
