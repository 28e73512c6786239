"""`mmkd demo`."""

from pathlib import Path

import click

from mmkd.cli.params import FOLDER_PATH


@click.command()
@click.argument("directory", type=FOLDER_PATH, default="mmkd-demo", metavar="[DIR]")
@click.option(
    "--corpus-only", is_flag=True, help="Only cut the images, with clean captions: the corpus of the suite `quick`."
)
def demo(directory: Path, corpus_only: bool) -> None:
    """Run the whole pipeline on real images, on a CPU, offline: corpus, nine teachers, store, two students, scores.

    One student learns from the teachers, the other only from the pairs.

    Everything is written to DIR (mmkd-demo by default). Run again to continue.
    Needs the extra `demo`.
    """
    if corpus_only:
        from mmkd.demo.corpus import build_corpus

        made = build_corpus(directory / "corpus", vague=0.0, wrong=0.0)
        click.echo(f"{made.train:,} training pairs and {made.test:,} held-out images in {directory / 'corpus'}")
        return
    from mmkd.demo.run import run_demo

    run_demo(directory, say=click.echo)
