"""`mmkd store info` and `mmkd store verify`: look at a store and check it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mmkd.base.text import counted
from mmkd.cli.store.group import store

if TYPE_CHECKING:
    from mmkd.store import VerifyReport


@store.command()
@click.argument("path", metavar="STORE")
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def info(path: str, as_json: bool) -> None:
    """One screen: rows, failures by reason, a map of shards, seconds, bytes, selections, and who made it."""
    from mmkd.cli.store.screen import info_lines, prints_blocks
    from mmkd.store import FeatureStore
    from mmkd.store.inspect.findings import store_findings
    from mmkd.store.inspect.info import store_info

    found = store_info(FeatureStore.open(path))
    if as_json:
        findings = [asdict(finding) for finding in store_findings(found)]
        click.echo(json.dumps(found.as_json() | {"findings": findings}, indent=1))
    else:
        click.echo("\n".join(info_lines(found, ascii_only=not prints_blocks())))


@store.command()
@click.argument("path", metavar="STORE")
@click.option("--deep", is_flag=True, help="Decode every feature too: finite, not zero, NaN where missing.")
@click.option("--repair", "mend", is_flag=True, help="Drop what is unsound, so that the next extract does it again.")
@click.option("-n", "--sample", type=click.IntRange(min=1), help="Only so many random shards.  [default: every shard]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides the sample.")
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def verify(path: str, deep: bool, mend: bool, sample: int | None, seed: int, as_json: bool) -> None:
    """Compare every byte with the ledger; exit status 1 when something is wrong and was not repaired.

    With -n, compare the bytes of some shards; metadata, entries and selections are looked at in full all the same.
    `mmkd teachers compare` says whether features are still what their teacher gives.
    """
    from mmkd.base.places.remote import as_root
    from mmkd.store.verify import repair
    from mmkd.store.verify import verify as check

    root = as_root(path)
    report = check(root, deep, sample, seed)
    done = repair(root, report) if mend else ()
    after = check(root, deep, sample, seed) if done else report
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
    found = counted(len(report.problems), "problem")
    verdict = "sound" if report.sound else f"{found}; `--repair` drops what is unsound"
    temporary, orphans = counted(len(report.temporary), "temporary file"), counted(len(report.orphans), "file")
    left = f"{temporary} and {orphans} without an entry left over"
    some = report.shards < report.all_shards
    share = f" ({report.shards:,} of {counted(report.all_shards, 'shard')}, drawn at random)" if some else ""
    return f"{verdict}: {depth} of {counted(report.entries, 'ledger entry')} checked{share}, {left}"
