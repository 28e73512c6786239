"""`mmkd extract`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from mmkd.cli.store_place import ENCODINGS, STORE

if TYPE_CHECKING:
    from mmkd.store.remote import StorePath


@click.command()
@click.argument("corpus")
@click.argument("store", type=STORE)
@click.option(
    "--teachers", default="all", show_default=True, help="all, or a,b, or NAME=local-dir:FOLDER, comma between."
)
@click.option("--scheduler", default="local", show_default=True, help="local, or the address of a Dask scheduler.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes of the local cluster.  [default: one per core]")
@click.option(
    "--keep-inputs", type=click.IntRange(min=1), metavar="PIXELS", help="Keep JPEGs of this shorter side for training."
)
@click.option("--trust-pickle", is_flag=True, help="Unpickle weights that need it; they can run any code.")
@click.option("--encoding", type=click.Choice(ENCODINGS), default="float16", show_default=True, help="Of new features.")
def extract(corpus: str, store: StorePath, **options: Any) -> None:
    """Run teachers over CORPUS and keep their features in STORE.

    CORPUS is a CSV, TSV or JSONL file with an image folder beside it, a WebDataset tar or a folder of
    them, or a corpus.yaml. Running the same command again does what is left; a bad image or caption
    costs its own row only.

    \b
    mmkd extract pairs.csv features/ --teachers biomedclip,plip
    mmkd extract shards/ features/ --teachers mine=local-dir:models/mine
    mmkd extract pairs.csv s3://bucket/features
    """
    from mmkd.extract.config import ExtractConfig
    from mmkd.extract.run import extract as run
    from mmkd.extract.run import summary_lines
    from mmkd.extract.teachers import parse_teachers

    trust = {"trust_pickle": options["trust_pickle"]}
    config = ExtractConfig(
        corpus=corpus,
        store=store,
        teachers=tuple(spec.model_copy(update=trust) for spec in parse_teachers(options["teachers"])),
        scheduler=options["scheduler"],
        workers=options["workers"],
        keep_inputs=options["keep_inputs"],
        encoding=options["encoding"],
    )
    report = run(config, say=click.echo)
    for line in summary_lines(report):
        click.echo(line)
    if report.lost_shards:
        sys.exit(1)
