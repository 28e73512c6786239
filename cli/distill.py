"""`mmkd distill`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path, dir_okay=False), metavar="RUN.yaml")
def distill(run: Path) -> None:
    """Train the student that RUN.yaml describes; running it again goes on from the last checkpoint.

    \b
    store: features            # paths are relative to RUN.yaml
    out: runs/first
    student: {model: ViT-B-16}
    epochs: 10
    """
    from mmkd.distill.config import load_run

    config = load_run(run)
    # After the configuration: a misspelt key is answered at once, not after seconds of importing torch.
    from mmkd.distill.trainer import train

    report = train(config, say=click.echo)
    if not report.first_rank:
        return
    terms = ", ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
    share = report.wait_seconds / report.seconds if report.seconds else 0.0
    click.echo(f"{report.steps} steps in {report.seconds:.0f} s, {share:.0%} of it waiting for data; losses: {terms}")
    for name, value in report.scores.items():
        click.echo(f"{name} {value:.4f}")
    if report.stopped:
        click.echo(f"stopped by {report.stopped}; the state is saved")
    click.echo(f"next: mmkd export {config.out} STUDENT_DIR")
