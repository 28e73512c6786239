"""`mmkd store info` and `mmkd store verify`: look at a store and check it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mmkd.cli.store.group import store

if TYPE_CHECKING:
    from mmkd.store import StoreSummary, VerifyReport


@store.command()
@click.argument("path", metavar="STORE")
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def info(path: str, as_json: bool) -> None:
    """Rows, failures by reason, coverage of each teacher, bytes."""
    from mmkd.store import FeatureStore

    summary = FeatureStore.open(path).summary()
    click.echo(json.dumps(asdict(summary) | {"complete": summary.complete}, indent=1) if as_json else _screen(summary))


@store.command()
@click.argument("path", metavar="STORE")
@click.option("--deep", is_flag=True, help="Decode every feature too: finite, not zero, NaN where missing.")
@click.option("--repair", "mend", is_flag=True, help="Drop what is unsound, so that the next extract does it again.")
@click.option(
    "--against-teacher",
    metavar="SLUG",
    help="Instead, run this teacher again on random rows; or NAME=local-dir:FOLDER.",
)
@click.option("-n", "--rows", type=click.IntRange(min=1), default=200, show_default=True, help="Rows to run again.")
@click.option("--corpus", help="The corpus, or the folder of its images, where it lies now.  [default: as recorded]")
@click.option("--tolerance", type=click.FloatRange(0, 2), help="Largest 1 - cosine of a row.  [default: 0.001]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides the rows.")
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def verify(
    path: str,
    deep: bool,
    mend: bool,
    against_teacher: str | None,
    rows: int,
    corpus: str | None,
    tolerance: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compare every byte with the ledger; exit status 1 when something is wrong and was not repaired.

    With --against-teacher, compare features with what the teacher says now: cosines within a tolerance.
    """
    from pathlib import Path

    if against_teacher is not None:
        if deep or mend:
            raise click.UsageError("--against-teacher does not go with --deep or --repair; run them one by one")
        from mmkd.cli.store.against import report_comparison
        from mmkd.extract.against_teacher import TOLERANCE, compare_with_teacher
        from mmkd.store import FeatureStore

        limit = TOLERANCE if tolerance is None else tolerance
        opened = FeatureStore.open(path)
        comparison = compare_with_teacher(opened, against_teacher, rows, corpus=corpus, tolerance=limit, seed=seed)
        report_comparison(comparison, as_json)
        if not comparison.sound:
            sys.exit(1)
        return

    from mmkd.store.repair import repair
    from mmkd.store.verify import verify as check

    root = Path(path)
    report = check(root, deep)
    done = repair(root, report) if mend else ()
    after = check(root, deep) if done else report
    if as_json:
        content = asdict(report) | {"problems": report.problems, "repaired": done, "sound": after.sound}
        click.echo(json.dumps(content, indent=1))
    else:
        for line in (*report.problems, *done):
            click.echo(line)
        click.echo(_verdict(after))
    if not after.sound:
        sys.exit(1)


def _verdict(report: VerifyReport) -> str:
    depth = "bytes and values" if report.deep else "bytes"
    verdict = "sound" if report.sound else f"{len(report.problems)} problems; `--repair` drops what is unsound"
    left = f"{len(report.temporary)} temporary files and {len(report.orphans)} files without an entry left over"
    return f"{verdict}: {depth} of {report.entries} ledger entries checked, {left}"


def _screen(summary: StoreSummary) -> str:
    status = ", ".join(f"{count:,} {name}" for name, count in summary.status.items())
    lines = [
        f"{summary.root}",
        f"corpus    {summary.corpus}, indexed {summary.created}",
        f"rows      {summary.rows:,} ({status}) in {summary.shards} shards of {summary.rows_per_shard:,}",
        f"samples   {_size(summary.sample_bytes)}",
    ]
    lines += [f"  {count:,} x {reason}" for reason, count in summary.reasons.items()]
    width = max((len(slug) for slug in summary.teachers), default=0)
    lines.append(f"teachers  {len(summary.teachers)}")
    for slug, teacher in summary.teachers.items():
        lines.append(
            f"  {slug:{width}}  {teacher.shards_done}/{summary.shards} shards  {teacher.image_rows:,} images  "
            f"{teacher.text_rows:,} texts  {_size(teacher.bytes)}  digest {teacher.digest}"
        )
    if not summary.complete:
        lines.append("not complete: run the same `mmkd extract` command again to go on")
    return "\n".join(lines)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"
