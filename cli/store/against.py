"""`mmkd store verify --against-teacher`: the words around the comparison."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mmkd.base.text import plain_values

if TYPE_CHECKING:
    from mmkd.extract.reextract import TeacherComparison, TowerCosines


def report_comparison(report: TeacherComparison, as_json: bool) -> None:
    """Print what the comparison found."""
    if as_json:
        content = asdict(report) | {"same_teacher": report.same_teacher, "sound": report.sound}
        click.echo(json.dumps(plain_values(content), indent=1))
    else:
        click.echo(_screen(report))


def _screen(report: TeacherComparison) -> str:
    lines = [f"{report.slug}: {report.source} run again on {report.rows} random rows"]
    if not report.same_teacher:
        lines.append(f"another teacher: digest {report.digest_now} now, {report.digest_stored} when it was stored")
    lines += [_tower(name, tower) for name, tower in (("images", report.image), ("captions", report.text))]
    lines += [f"  {count:,} x {reason}" for reason, count in report.not_compared.items()]
    below = report.image.below + report.text.below
    compared = report.image.compared + report.text.compared
    lines.append(
        f"{'sound' if report.sound else 'NOT sound'}: {below} of {compared} features differ "
        f"by more than {report.tolerance:g} (1 - cosine)"
    )
    return "\n".join(lines)


def _tower(name: str, tower: TowerCosines) -> str:
    if not tower.compared:
        return f"{name:9} none compared"
    quantiles = "  ".join(f"{at} {value:.6f}" for at, value in tower.quantiles.items())
    return (
        f"{name:9} {tower.compared} compared, cosine min {tower.smallest:.6f}  {quantiles}  mean {tower.mean:.6f}; "
        f"to other rows {tower.strangers:.3f}"
    )
