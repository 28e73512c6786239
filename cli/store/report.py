"""`mmkd store report`: one page that opens offline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.cli.params import STORE
from mmkd.cli.store.group import store
from mmkd.cli.store.stats import sample_rows

if TYPE_CHECKING:
    from mmkd.base.places.remote import StorePath
    from mmkd.store.inspect.projection import Method


@store.command()
@click.argument("path", metavar="STORE", type=STORE)
@click.argument("out", metavar="OUT.html", type=click.Path(path_type=Path))
@click.option("--teachers", help="Names, with commas between; all when not given.")
@click.option("--sample", default="8192", show_default=True, help="Rows for the statistics, or `all`.")
@click.option("--seed", default=0, show_default=True, help="Of the rows drawn.")
@click.option("--projection", type=click.Choice(["pca", "umap"]), default="pca", show_default=True, help="Of the map.")
@click.option("--json", "as_json", is_flag=True, help="Where the page is and what it found, for programs.")
def report(
    path: StorePath, out: Path, teachers: str | None, sample: str, seed: int, projection: Method, as_json: bool
) -> None:
    """Write one self-contained page: coverage, distributions, agreement, a map, odd rows and failures."""
    from mmkd.cli.store.screen import finding_lines
    from mmkd.store import FeatureStore
    from mmkd.store.report.content import Options
    from mmkd.store.report.page import write_report

    options = Options(tuple(teachers.split(",")) if teachers else None, sample_rows(sample), seed, projection)
    content = write_report(
        FeatureStore.open(path), out, options, None if as_json else lambda step: click.echo(f"{step} ...", err=True)
    )
    size = out.stat().st_size
    if as_json:
        findings = [asdict(finding) for finding in content.findings]
        odd = [asdict(outlier) for outlier in content.outliers]
        click.echo(json.dumps({"page": str(out), "bytes": size, "findings": findings, "odd_rows": odd}, indent=1))
        return
    click.echo(f"{out}: {size / 1e6:.1f} MB, opens in any browser, needs no network")
    for line in finding_lines(content.findings):
        click.echo(line)
