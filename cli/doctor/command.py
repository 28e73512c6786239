"""`mmkd doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mmkd.cli.doctor import Check

WIDTH = 160
"""Characters of a line's text on the screen; `--json` has all."""


def examine(folder: Path, seconds: float) -> Iterator[Check]:
    """Yield each check as it is done; changes nothing. `folder`: location of stores. `seconds`: limit for each check
    outside this process: torch with its driver, Dask, and the hub."""
    from mmkd.cli.doctor.hub import cache_folder, hub_check, teacher_checks
    from mmkd.cli.doctor.machine import disk_checks, machine_checks
    from mmkd.cli.doctor.packages import package_checks

    yield from machine_checks(seconds)
    yield from package_checks()
    yield hub_check(min(seconds, 10))
    yield from teacher_checks()
    yield from disk_checks(folder, cache_folder())


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    help="Seconds to wait for torch; for the hub, at most 10.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(folder: Path, timeout: float, as_json: bool) -> None:
    """Check the machine, packages, hub, teachers' weights and licenses, and the free space in FOLDER for stores.

    Changes nothing, needs no network. Exit status 1 when something must be corrected before mmkd can work.
    """
    found = []
    part = ""
    for check in examine(folder, timeout):
        found.append(check)
        if as_json:
            continue
        if check.part != part:
            part = check.part
            click.echo(part)
        click.echo(f"  {check.status:7}  {check.name}: {shorten(check.found, WIDTH, placeholder=' ...')}")
        if check.next_step and check.status != "ok":
            click.echo(f"           next: {check.next_step}")
    if as_json:
        click.echo(json.dumps([asdict(check) for check in found], indent=1))
    if any(check.status == "fault" for check in found):
        sys.exit(1)
