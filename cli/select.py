"""`mmkd select`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mmkd.base.text import counted

if TYPE_CHECKING:
    from mmkd.store.selection import SelectionReport


@click.command()
@click.argument("store", metavar="STORE")
@click.option("--name", required=True, help="Name of the selection: a folder below STORE/selections.")
@click.option("--rule", required=True, metavar="RULE.yaml", help="A rule's file, or the name of an included rule.")
@click.option("--by", default="modality", show_default=True, help="Sample column by which kept pairs are counted.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def select(store: str, name: str, rule: str, by: str, as_json: bool) -> None:
    """Choose pairs of samples and teachers by a rule; features are unchanged.

    \b
    mmkd select features --name ranked --rule retrieval_rank
    mmkd select features --name mine --rule mine.yaml --by site

    Included rules: agreement, best_three, cosine_fifth, retrieval_rank, mmkd_paper_share,
    mmkd_release_reconstruction. Train on the result with `selection: NAME` in the run's YAML.
    """
    from tqdm import tqdm

    from mmkd.store import FeatureStore
    from mmkd.store.selection import load_rule
    from mmkd.store.selection import select as run
    from mmkd.store.selection.rules import find_rule

    loaded = load_rule(find_rule(rule))
    opened = FeatureStore.open(store)
    with tqdm(unit="block", disable=as_json or not sys.stderr.isatty()) as bar:

        def progress(done: int, every: int) -> None:
            bar.total = every
            bar.update(done - bar.n)

        report = run(opened, name, loaded, by, progress)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if as_json:
        examples = {line: [one.model_dump(mode="json") for one in found] for line, found in report.examples.items()}
        plain = asdict(report) | {"counts": report.counts.model_dump(mode="json"), "examples": examples}
        click.echo(json.dumps(plain, indent=1))
    else:
        click.echo(_screen(report))


def _screen(report: SelectionReport) -> str:
    counts = report.counts
    share = counts.pairs.kept / counts.pairs.available
    lines = [
        f"{counts.pairs.kept:,} of {counts.pairs.available:,} pairs kept ({share:.1%}); "
        f"{counted(counts.rows_without, 'row')} without any teacher",
        "rows by number of teachers kept: "
        + ", ".join(f"{t}: {rows:,}" for t, rows in enumerate(counts.rows_by_teachers)),
    ]
    for title, shares in (("teacher", counts.teachers), (counts.by, counts.groups)):
        width = max(len(title), *(len(name) for name in shares))
        lines.append(f"\n{title:{width}}  {'pairs':>12}  {'kept':>12}")
        lines += [
            f"{name:{width}}  {one.available:12,}  {one.kept:12,}  {one.kept / max(one.available, 1):6.1%}"
            for name, one in shares.items()
        ]
    width = max(map(len, counts.overlaps))
    lines.append("\nof the rows kept for the teacher on the left, percent also kept for")
    lines.append(" " * width + "".join(f"{slug[:11]:>12}" for slug in counts.overlaps))
    for slug, row in counts.overlaps.items():
        own = max(row[slug], 1)
        lines.append(f"{slug:{width}}" + "".join(f"{100 * both / own:12.0f}" for both in row.values()))
    for rule, found in report.examples.items():
        lines.append(f"\nnear the threshold of {rule}")
        for one in found:
            score = "-" if one.score is None else f"{one.score:.4g}"
            caption = " ".join(one.caption.split())[:60]
            kept = "kept   " if one.kept else "dropped"
            lines.append(f"  {kept}  {score:>10}  {one.teacher}  row {one.row}  {one.key}: {caption}")
    return "\n".join([*lines, f"\nselection {report.name!r} written, digest {report.digest[:16]}"])
