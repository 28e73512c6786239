"""`mmkd evaluate`: scores of all encoders of a store, from features alone."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mmkd.base.places.remote import StorePath, as_root
from mmkd.cli.params import ANY_PATH, FILE_PATH, FOLDER_PATH, JSON

if TYPE_CHECKING:
    from mmkd.evaluate.folder import By, ResultFolder
    from mmkd.evaluate.runner import Outcome

Command = TypeVar("Command", bound=Callable[..., Any])

SUITE = click.argument("suite", type=FILE_PATH)
FILE = click.argument("file", type=FILE_PATH)
MODEL = click.option("--model", required=True, help="Model to compare with the others.")
OUT = click.option("--out", type=FOLDER_PATH, help="Folder of the results.  [default: SUITE-results]")
BY = click.option(
    "--by", type=click.Choice(["domain", "dataset", "modality"]), default="domain", help="Grouping of the columns."
)
KINDS = ["heat-map", "forest", "box", "radar", "label-efficiency", "shots"]
KINDS += ["kaplan-meier", "reliability", "decision-curve"]


def question(command: Command) -> Command:
    """Options that choose what a table, comparison or figure shows."""
    for option in (
        click.option("--fraction", type=float, default=1.0, help="Share of the labels used."),
        click.option("--head", help="Head to show, such as i2t or t2i.  [default: all heads of the task]"),
        BY,
        click.option("--metric", help="Metric to show.  [default: the task's primary one]"),
        click.option("--task", help="Task to show.  [default: all tasks of the suite]"),
        OUT,
    ):
        command = option(command)
    return command


@click.group()
def evaluate() -> None:
    """Score teachers and students on suites described in YAML."""


@evaluate.command()
@SUITE
@JSON
def check(suite: Path, as_json: bool) -> None:
    """Report what SUITE still needs, without running it.

    \b
    mmkd evaluate check suite.yaml
    """
    from mmkd.evaluate.check import check_suite
    from mmkd.evaluate.suite import load_suite

    report = check_suite(load_suite(suite))
    click.echo(report.json() if as_json else report.text())
    if not report.ok:
        sys.exit(1)


@evaluate.command()
@click.argument("dataset", metavar="SET")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded.")
def fetch(dataset: str, dry_run: bool) -> None:
    """Download SET, a set that comes with mmkd or a description, where its license allows; else say how to get it.

    \b
    mmkd evaluate fetch breastmnist
    """
    from mmkd.base.text import one_line
    from mmkd.evaluate.fetch import fetch_dataset

    if not fetch_dataset(dataset, lambda line: click.echo(one_line(line)), dry_run=dry_run):
        sys.exit(1)


@evaluate.command()
@SUITE
@OUT
@click.option("--force", is_flag=True, help="Rerun finished units.")
@click.option(
    "--for-selection", is_flag=True, help="Scores will be used to select a model: refuse sets with `role: report`."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Units to run at once, one process each.  [default: one per core]"
)
def run(suite: Path, out: Path | None, force: bool, for_selection: bool, jobs: int | None) -> None:
    """Run the units of SUITE that have no result yet; a unit that fails is recorded and does not stop the others.

    \b
    mmkd evaluate run suite.yaml --out results
    mmkd evaluate run suite.yaml --jobs 4
    """
    from tqdm import tqdm

    from mmkd.base.process import usable_cores
    from mmkd.base.text import one_line
    from mmkd.evaluate.runner import run_suite
    from mmkd.evaluate.suite import load_suite

    loaded, folder = load_suite(suite), out or _default(suite)
    with tqdm(unit="unit", disable=not sys.stderr.isatty()) as bar:
        say = functools.partial(bar.write, file=sys.stderr)

        def show(outcome: "Outcome", total: int) -> None:
            bar.total = total
            bar.update()
            if outcome.status == "failed":
                say(one_line(f"failed: {outcome.unit}: {outcome.reason}"))

        workers = jobs or usable_cores()
        report = run_suite(loaded, folder, selection=for_selection, force=force, jobs=workers, progress=show, say=say)
    click.echo(str(report))
    if report.failed:
        sys.exit(1)


@evaluate.command()
@SUITE
@question
@click.option(
    "--format",
    "style",
    type=click.Choice(["markdown", "csv", "latex", "json"]),
    default="markdown",
    help="Output format.",
)
@JSON
def table(as_json: bool, **options: Any) -> None:
    """Print the scores of the last run of SUITE: models down, domains and their mean across.

    \b
    mmkd evaluate table suite.yaml --task zero_shot --by domain
    mmkd evaluate table suite.yaml --task linear_probe --fraction 0.1 --format csv
    """
    from mmkd.evaluate.table import build_table

    folder, style = _results(options.pop("suite"), options.pop("out")), options.pop("style")
    tables = [build_table(folder, asked) for asked in folder.questions(**options)]
    click.echo("\n".join(getattr(one, "json" if as_json else style)() for one in tables), nl=False)


@evaluate.command()
@SUITE
@click.argument("model")
@question
@click.option("--against", multiple=True, help="Model to compare with; repeatable.  [default: all others]")
@JSON
def compare(model: str, against: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare MODEL with each other model of SUITE, paired on the same samples.

    \b
    mmkd evaluate compare suite.yaml student --task zero_shot
    """
    from mmkd.evaluate.compare import compare as compare_models

    folder = _results(options.pop("suite"), options.pop("out"))
    found = [compare_models(folder, model, asked, against) for asked in folder.questions(**options)]
    click.echo("\n".join(one.json() if as_json else one.markdown() for one in found), nl=False)


@evaluate.command()
@SUITE
@click.argument("column")
@question
@click.option("--model", multiple=True, help="Model to show; repeatable.  [default: all]")
@JSON
def subgroups(column: str, model: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Print the scores of the subgroups by COLUMN (sex, site, scanner, age), and how far each lies from the rest.

    \b
    mmkd evaluate subgroups suite.yaml sex --task zero_shot --model student
    """
    from mmkd.evaluate.subgroups import subgroup_table

    folder = _results(options.pop("suite"), options.pop("out"))
    found = [subgroup_table(folder, asked, column, model) for asked in folder.questions(**options)]
    click.echo("\n".join(one.json() if as_json else one.markdown() for one in found), nl=False)


@evaluate.command()
@SUITE
@click.argument("kind", type=click.Choice(KINDS))
@FILE
@MODEL
@question
def figure(kind: str, file: Path, model: str, **options: Any) -> None:
    """Draw a figure of the last run of SUITE into FILE (.svg, .png or .pdf).

    \b
    mmkd evaluate figure suite.yaml forest forest.svg --model student --task zero_shot
    """
    from mmkd.evaluate.drawing import save
    from mmkd.evaluate.figures import FIGURES

    folder = _results(options.pop("suite"), options.pop("out"))
    first, *others = folder.questions(**options)
    if others:
        asked = ", ".join(f"{one.task} {one.head}".strip() for one in (first, *others))
        raise click.UsageError(f"a figure shows one task and head; choose from {asked} with --task and --head")
    save(FIGURES[kind](folder, first, model), file)
    click.echo(f"wrote {file}")


@evaluate.command()
@SUITE
@FILE
@MODEL
@OUT
@BY
def report(suite: Path, file: Path, model: str, out: Path | None, by: "By") -> None:
    """Write the last run of SUITE as one page that opens offline: tables, comparisons, figures, failures.

    \b
    mmkd evaluate report suite.yaml report.html --model student
    """
    from mmkd.evaluate.pages import write_report

    folder = _results(suite, out)
    write_report(folder.out, model, file, by, folder.plan.suite.suite)
    click.echo(f"wrote {file}")


@evaluate.command()
@SUITE
@click.option("--training", type=as_root, metavar="STORE", help="Store of the students' training corpus.")
@click.option("--model", help="Encoder whose features are compared.  [default: the first that all stores have]")
@click.option("--cosine", type=float, default=0.98, help="Least cosine of near copies.")
@click.option(
    "--hashes",
    type=FILE_PATH,
    help="Also compare perceptual hashes; all images are read once, and their hashes are stored in this Parquet file.",
)
@click.option("--bits", type=int, default=4, help="Most differing hash bits of near copies.")
@JSON
def leakage(suite: Path, training: StorePath | None, hashes: Path | None, as_json: bool, **options: Any) -> None:
    """Find copies of SUITE's test images in a training corpus, in other splits and within a split.

    \b
    mmkd evaluate leakage suite.yaml --training features
    mmkd evaluate leakage suite.yaml --training features --hashes hashes.parquet
    """
    from mmkd.evaluate.leakage import ImageHashes, Thresholds, find_leakage
    from mmkd.evaluate.suite import load_suite
    from mmkd.store import FeatureStore

    limits = Thresholds(options["cosine"], options["bits"])
    kept = None if hashes is None else ImageHashes(hashes, functools.partial(click.echo, err=True))
    corpus = None if training is None else FeatureStore.open(training)
    report = find_leakage(load_suite(suite), corpus, options["model"], limits, kept)
    click.echo(report.json() if as_json else report.text())


@evaluate.command()
@SUITE
@click.option(
    "--biology", required=True, metavar="LABEL", help="Column that features should follow, such as the label."
)
@click.option("--confounder", required=True, metavar="COLUMN", help="Column that they should not: hospital, scanner.")
@click.option("--dataset", help="Data set of the suite.  [default: all with both columns]")
@click.option("--k", type=click.IntRange(min=1), help="Neighbors.  [default: median of the models' best]")
@click.option("--jobs", type=click.IntRange(min=1), help="Models at once.  [default: one per core]")
@OUT
@JSON
def trust(suite: Path, biology: str, confounder: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Measure whether features follow biology or a confounder such as the hospital; one page per model.

    \b
    mmkd evaluate trust suite.yaml --biology diagnosis --confounder hospital
    """
    from mmkd.base.process import usable_cores
    from mmkd.evaluate.pages import write_trust
    from mmkd.evaluate.robustness import TrustSettings
    from mmkd.evaluate.suite import load_suite
    from mmkd.evaluate.trust import measure_trust

    jobs, settings = options["jobs"] or usable_cores(), TrustSettings(k=options["k"])
    loaded, folder = load_suite(suite), (out or _default(suite)) / "trust"
    reports = measure_trust(loaded, biology, confounder, settings, dataset=options["dataset"], jobs=jobs)
    for report in reports:
        pages = write_trust(folder, report)
        click.echo(report.as_json() if as_json else report.text())
        click.echo(f"wrote {len(pages) - 1} pages and {pages[0]}", err=True)


@evaluate.command()
@SUITE
@click.option("--dataset", help="Data set of the suite.  [default: all with corrupted images]")
@OUT
@JSON
def corruptions(suite: Path, dataset: str | None, out: Path | None, as_json: bool) -> None:
    """Measure what the corruptions of `mmkd extract --corrupt` cost each model; one page per data set.

    \b
    mmkd evaluate corruptions suite.yaml
    """
    from mmkd.evaluate.corruptions import measure_corruptions
    from mmkd.evaluate.pages import write_corruptions
    from mmkd.evaluate.suite import load_suite

    folder = (out or _default(suite)) / "corruptions"
    for report in measure_corruptions(load_suite(suite), dataset):
        page = write_corruptions(folder, report)
        click.echo(report.as_json() if as_json else report.text())
        click.echo(f"wrote {page}", err=True)


@evaluate.command()
@click.argument("out", type=ANY_PATH)
@click.argument("folders", type=click.Path(exists=True, file_okay=False, path_type=Path), nargs=-1, required=True)
@click.option("--suite", help="Name of the suite, where a folder has results of several.")
def merge(out: Path, folders: tuple[Path, ...], suite: str | None) -> None:
    """Merge results of one suite in FOLDERS, such as those of several labs, into the new folder OUT.

    \b
    mmkd evaluate merge all-labs results-berlin results-lyon
    mmkd evaluate leaderboard suite.yaml page.html --out all-labs
    """
    from mmkd.evaluate.merge import merge_results

    click.echo(str(merge_results(out, folders, suite)))


@evaluate.command()
@SUITE
@FILE
@OUT
def leaderboard(suite: Path, file: Path, out: Path | None) -> None:
    """Write all models on all tasks of SUITE, and what `trust` measured, as one page that opens offline.

    \b
    mmkd evaluate leaderboard suite.yaml leaderboard.html
    """
    from mmkd.evaluate.pages import write_leaderboard

    write_leaderboard(_results(suite, out), file)
    click.echo(f"wrote {file}")


@evaluate.command()
@SUITE
@click.argument("text", metavar="CLAIM")
@click.option("--metric", help="Metric.  [default: the task's primary one]")
@click.option(
    "--comparisons",
    type=click.IntRange(min=1),
    default=1,
    help="Claims that are considered together; intervals are widened for them.",
)
@OUT
@JSON
def claim(suite: Path, text: str, metric: str | None, comparisons: int, out: Path | None, as_json: bool) -> None:
    """Judge CLAIM, `MODEL beats MODEL on TASK`: yes, no or cannot tell, with the numbers.

    \b
    mmkd evaluate claim suite.yaml "student beats biomedclip on zero_shot"
    mmkd evaluate claim suite.yaml "student beats all on retrieval/i2t" --comparisons 4
    """
    from mmkd.evaluate.compare import judge

    found = judge(_results(suite, out), text, metric, comparisons)
    click.echo(found.json() if as_json else str(found))


def _default(suite: Path) -> Path:
    return suite.with_name(f"{suite.stem}-results")


def _results(suite: Path, out: Path | None) -> "ResultFolder":
    """Return the results of this suite, and of no other that was run into the folder."""
    from mmkd.evaluate.folder import ResultFolder
    from mmkd.evaluate.suite import load_suite

    return ResultFolder(out or _default(suite), load_suite(suite).suite)
