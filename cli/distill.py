"""`mmkd distill`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from mmkd.cli.params import FILE_PATH


@click.command()
@click.argument("run", type=FILE_PATH, metavar="RUN.yaml")
@click.option(
    "--dry-run", is_flag=True, help="Take a few steps and print parameters, memory, steps and hours; write nothing."
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
def distill(run: Path, dry_run: bool, as_json: bool) -> None:
    """Train the student that RUN.yaml describes. Run again to continue from the last checkpoint.

    \b
    preset: distil             # pretrain, distil, large, or YAML files of your own; keys below win
    store: features            # paths are relative to RUN.yaml
    out: runs/first
    student: {model: ViT-B-16}
    epochs: 10
    \b
    mmkd distill run.yaml --dry-run
    torchrun --nproc-per-node 8 --no-python mmkd distill run.yaml

    Exit status 143 or 138 after SIGTERM or SIGUSR1 (128 plus the signal's number); the state is saved first.
    """
    from mmkd.distill.config import load_run

    config = load_run(run)
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run")
    # After the configuration: a misspelled key is reported before the slow imports.
    from mmkd.distill.trainer import train

    if dry_run:
        from mmkd.distill.probe import estimate

        found = estimate(config, say=lambda line: click.echo(line, err=True))
        if found is not None:
            click.echo(json.dumps(asdict(found) | {"hours": found.hours}) if as_json else "\n".join(found.lines()))
        return
    report = train(config, say=click.echo)
    if not report.first_rank:
        sys.exit(128 + report.stop_signal if report.stop_signal else 0)
    click.echo(report.line)
    for name, value in report.scores.items():
        click.echo(f"{name} {value:.4f}")
    if report.stop_signal:
        click.echo(f"stopped by {report.stopped} with the state saved; the same command continues", err=True)
        sys.exit(128 + report.stop_signal)
    if report.stopped:
        click.echo(f"stopped by {report.stopped}: nothing better since step {report.best.best_step}")
    click.echo(f"next: mmkd export {config.out} STUDENT_DIR")
