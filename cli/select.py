"""`mmkd select`."""

from collections.abc import Iterator
from dataclasses import asdict

import click

from mmkd.base.text import counted
from mmkd.cli.params import JSON, echo, progress_bar
from mmkd.store import FeatureStore
from mmkd.store.selection import SelectionReport, load_rule
from mmkd.store.selection import select as run
from mmkd.store.selection.rules import find_rule


@click.command()
@click.argument("store", metavar="STORE")
@click.option("--name", required=True, help="Name of the selection: a folder below STORE/selections.")
@click.option("--rule", required=True, metavar="RULE.yaml", help="A rule's file, or the name of an included rule.")
@click.option("--by", default="modality", help="Sample column by which kept pairs are counted.")
@JSON
def select(store: str, name: str, rule: str, by: str, as_json: bool) -> None:
    """Choose pairs of samples and teachers by a rule; features are unchanged.

    \b
    mmkd select features --name ranked --rule retrieval_rank
    mmkd select features --name mine --rule mine.yaml --by site

    Included rules: agreement, best_three, cosine_fifth, retrieval_rank, mmkd_paper_share,
    mmkd_release_reconstruction. Train on the result with `selection: NAME` in the run's YAML.
    """
    loaded = load_rule(find_rule(rule))
    opened = FeatureStore.open(store)
    with progress_bar("block", hidden=as_json) as progress:
        report = run(opened, name, loaded, by, progress)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)
    examples = {line: [one.model_dump(mode="json") for one in found] for line, found in report.examples.items()}
    plain = asdict(report) | {"counts": report.counts.model_dump(mode="json"), "examples": examples}
    echo(as_json, plain, _screen(report))


def _screen(report: SelectionReport) -> Iterator[str]:
    counts = report.counts
    share = counts.pairs.kept / counts.pairs.available
    without = f"{counted(counts.rows_without, 'row')} without any teacher"
    yield f"{counts.pairs.kept:,} of {counts.pairs.available:,} pairs kept ({share:.1%}); {without}"
    by_number = (f"{t}: {rows:,}" for t, rows in enumerate(counts.rows_by_teachers))
    yield f"rows by number of teachers kept: {', '.join(by_number)}"
    for title, shares in (("teacher", counts.teachers), (counts.by, counts.groups)):
        width = max(len(title), *(len(name) for name in shares))
        yield from ("", f"{title:{width}}  {'pairs':>12}  {'kept':>12}")
        for name, of in shares.items():
            yield f"{name:{width}}  {of.available:12,}  {of.kept:12,}  {of.kept / max(of.available, 1):6.1%}"
    width = max(map(len, counts.overlaps))
    yield from ("", "of the rows kept for the teacher on the left, percent also kept for")
    yield (" " * width + "".join(f"{slug[:11]:>12}" for slug in counts.overlaps))
    for slug, row in counts.overlaps.items():
        own = max(row[slug], 1)
        yield f"{slug:{width}}" + "".join(f"{100 * both / own:12.0f}" for both in row.values())
    for rule, found in report.examples.items():
        yield from ("", f"near the threshold of {rule}")
        for one in found:
            score = "-" if one.score is None else f"{one.score:.4g}"
            caption = " ".join(one.caption.split())[:60]
            kept = "kept   " if one.kept else "dropped"
            yield f"  {kept}  {score:>10}  {one.teacher}  row {one.row}  {one.key}: {caption}"
    yield from ("", f"selection {report.name!r} written, digest {report.digest[:16]}")
