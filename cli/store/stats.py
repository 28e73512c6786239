"""`mmkd store stats`: statistics of the features."""

from collections.abc import Iterator
from dataclasses import asdict

import click

from mmkd.base.places.remote import StorePath
from mmkd.base.text import table_lines
from mmkd.cli.params import JSON, SAMPLE, SEED, STORE_PATH, TEACHERS, Names, echo, progress_bar
from mmkd.cli.store.info import finding_lines
from mmkd.store import FeatureStore
from mmkd.store.inspect.agreement import MIN_SHARED
from mmkd.store.inspect.findings import Finding, statistics_findings, store_findings
from mmkd.store.inspect.info import store_info
from mmkd.store.inspect.statistics import StoreStatistics, store_statistics
from mmkd.store.inspect.tables import statistics_tables


@click.command()
@STORE_PATH
@TEACHERS
@SAMPLE(default="8192")
@SEED
@JSON
def stats(path: StorePath, teachers: Names, sample: int | None, seed: int, as_json: bool) -> None:
    """Norms, cosines, retrieval, isotropy, repeats, dead dimensions, and how far teachers agree."""
    with progress_bar("teacher", hidden=as_json) as progress:
        opened = FeatureStore.open(path)
        found = store_statistics(opened, teachers, sample, seed, progress)
    findings = [*store_findings(store_info(opened)), *statistics_findings(found)]
    content = found.as_json() | {"findings": [asdict(finding) for finding in findings]}
    echo(as_json, content, _lines(found, findings))


def _lines(found: StoreStatistics, findings: list[Finding]) -> Iterator[str]:
    yield f"{found.root}: {found.drawn}"
    for table in statistics_tables(found):
        yield table.title
        yield from table_lines(table.header, table.text_rows())
    if len(found.pairs) > 1 and not any(matrix.compared for matrix in found.agreement):
        yield f"agreement needs two teachers that share at least {MIN_SHARED} sound rows"
    yield from finding_lines(findings)
    if not findings:
        yield "nothing conspicuous"
