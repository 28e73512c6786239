"""`mmkd extract`."""

import os
import sys
from typing import Any

import click

from mmkd.base.places.remote import StorePath, as_root

SCHEDULER = "local, slurm, pbs, sge, a scheduler's address, or a YAML file that describes the cluster."


@click.command()
@click.argument("corpus")
@click.argument("store", type=as_root)
@click.option("--teachers", default="all", help="all, or comma-separated names, NAME=local-dir:FOLDER or YAML cards.")
@click.option("--scheduler", default="local", help=SCHEDULER)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per GPU or core; one job]")
@click.option(
    "--rows-per-shard",
    type=click.Choice([str(1 << power) for power in range(8, 15)]),
    help="Of a new store.  [default: such that all workers are busy]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Extract only the first rows of the corpus.")
@click.option(
    "--require",
    type=click.Choice(["pairs", "images", "texts"]),
    help="Skip rows without an image and a caption, or without the one named.",
)
@click.option("--dry-run", is_flag=True, help="Write nothing; print the rows, bytes and hours of a run.")
@click.option(
    "--failures",
    multiple=True,
    metavar="N|N%|retry",
    help="Stop when more rows than this fail, such as 1%; with retry, also read again the images that failed.",
)
@click.option(
    "--views",
    metavar="V|FILE",
    help="Also extract this many random views of each image; a YAML file says how they are drawn.",
)
@click.option(
    "--corrupt",
    metavar="SUITE",
    help="Also extract corrupted pictures of each image, for `mmkd evaluate corruptions`: general, ct, pathology, "
    "another suite that comes with mmkd, or a YAML file.",
)
@click.option(
    "--keep-inputs",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Also store images for training, as JPEGs with a shorter side of this length.",
)
def extract(corpus: str, store: StorePath, **options: Any) -> None:
    """Run teachers over CORPUS and store their features in STORE.

    CORPUS is a CSV, TSV or JSONL file with an image folder beside it, a WebDataset tar or a folder of
    them, a folder of images with texts beside them, or a corpus.yaml. What it holds and what is ignored
    is printed first. Run the same command again to continue; a bad image or caption fails only
    its own row.

    \b
    mmkd extract pairs.csv features/ --teachers biomedclip,plip
    mmkd extract shards/ features/ --teachers mine=local-dir:models/mine --dry-run
    mmkd extract shards/ features/ --scheduler cluster.yaml --workers 16 --failures 1%
    mmkd extract pairs.csv s3://bucket/features
    """
    from mmkd.base.images.corruptions import find_corruptions
    from mmkd.base.images.recipe import parse_recipe
    from mmkd.extract.cluster_config import load_cluster
    from mmkd.extract.config import ExtractConfig, parse_failures
    from mmkd.extract.teachers import parse_teachers

    max_failures, retry_failed = parse_failures(options["failures"])
    views, corrupt = options["views"], options["corrupt"]
    recipes = [] if views is None else [parse_recipe("views", views)]
    recipes += [] if corrupt is None else [find_corruptions(corrupt)]
    config = ExtractConfig(
        corpus=corpus,
        store=store,
        teachers=tuple(parse_teachers(options["teachers"])),
        cluster=load_cluster(options["scheduler"], options["workers"]),
        rows_per_shard=options["rows_per_shard"] and int(options["rows_per_shard"]),
        limit=options["limit"],
        require=options["require"],
        recipes=tuple(recipes),
        keep_inputs=options["keep_inputs"],
        retry_failed=retry_failed,
        max_failures=max_failures,
    )
    # torch is imported after options and corpus are checked: a misspelled name or path fails at once.
    _ = config.opened
    if options["dry_run"]:
        from mmkd.extract.estimate import estimate, estimate_lines

        for line in estimate_lines(estimate(config, say=click.echo)):
            click.echo(line)
        return
    from mmkd.extract.report import summary_lines
    from mmkd.extract.run import extract as run

    try:
        report = run(config, say=click.echo)
    except KeyboardInterrupt:
        click.echo("Stopped; what was finished is kept: run the same command again to continue", err=True)
        # At once: what Dask does at exit asserts that a cluster which was being started had started.
        os._exit(130)
    for line in summary_lines(report):
        click.echo(line)
    if report.lost:
        sys.exit(1)
