"""`mmkd store pull`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from mmkd.base.text import counted
from mmkd.cli.params import STORE
from mmkd.cli.store.group import store

if TYPE_CHECKING:
    from mmkd.base.places.remote import StorePath


@store.command()
@click.argument("url", metavar="URL", type=STORE)
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--teachers", help="Teachers to copy, separated by commas.  [default: all]")
@click.option("--shards", metavar="FIRST:END", help="Shards whose features to copy, END not included.  [default: all]")
@click.option(
    "--workers", type=click.IntRange(1, 256), default=8, show_default=True, help="Files copied at the same time."
)
@click.option("--inputs/--no-inputs", default=True, show_default=True, help="Also copy training inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(
    url: StorePath, out: Path, teachers: str | None, shards: str | None, workers: int, inputs: bool, as_json: bool
) -> None:
    """Copy a store, or a part of it, to disk; each file is checked against the ledger. Run again to continue.

    All sample rows are copied, and selections of the copied teachers. Shards that are left out count as not
    extracted; pull again for them.

    \b
    mmkd store pull s3://bucket/features features/ --teachers biomedclip,plip --shards 0:10
    """
    from mmkd.store import FeatureStore
    from mmkd.store.pull import pull as bring
    from mmkd.store.pull import shard_range

    source = FeatureStore.open(url)
    with tqdm(unit="file", disable=True if as_json else None) as bar:

        def progress(done: int, every: int) -> None:
            bar.total = every
            bar.update(done - bar.n)

        report = bring(
            source,
            out,
            teachers=teachers.split(",") if teachers else None,
            shards=shard_range(shards, source.shards) if shards else None,
            inputs=inputs,
            workers=workers,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(asdict(report), indent=1))
    else:
        click.echo(
            f"{counted(report.rows, 'row')} in {out}; {counted(report.shards, 'shard')} copied "
            f"({report.bytes / 2**20:,.1f} MB), {report.present} present before"
        )
