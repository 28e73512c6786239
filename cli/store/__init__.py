"""`mmkd store ...`."""

import click

from mmkd.cli.store import convert, info, report, rows, show, stats


@click.group()
def store() -> None:
    """Inspect, check, copy and convert a store. STORE is a folder or a URL such as s3://bucket/store."""


for command in (
    info.info, info.verify, show.show, show.neighbors, stats.stats, report.report, report.atlas, rows.pull,
    rows.subset, rows.merge, rows.append, rows.relocate, rows.fold, info.diff, info.tag, convert.import_,
    convert.export,
):  # fmt: skip
    store.add_command(command)
