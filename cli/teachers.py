"""`mmkd teachers ...`: list, load and compare teachers."""

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click
import yaml

from mmkd.base.errors import TeacherError
from mmkd.base.text import plain_values, table_lines
from mmkd.cli.params import ANY_PATH, JSON, SEED, echo
from mmkd.extract.teachers.published import PublishedTeacher, encoders, known_teacher, parse_teacher, the_nine, variants
from mmkd.store import FeatureStore
from mmkd.store.layout import TOWER_INPUTS

if TYPE_CHECKING:
    from mmkd.extract.teachers.check import CheckReport, TowerReport

_TRUST = click.option(
    "--trust-pickle",
    is_flag=True,
    help="Unpickle files that need it, which can run any code; their SHA-256 is printed.",
)


@click.group()
def teachers() -> None:
    """List teachers, check that they load, compare them."""


@teachers.command("list")
@JSON
def list_teachers(as_json: bool) -> None:
    """List the nine teachers of the original, their variants, then other public encoders."""
    groups = {"the_nine": the_nine(), "variants": variants(), "encoders": encoders()}
    if as_json:
        click.echo(json.dumps({name: [t.model_dump() for t in group] for name, group in groups.items()}, indent=1))
        return
    rows = []
    for teacher in itertools.chain(*groups.values()):
        name = f"{teacher.slug} *" if teacher.inferred else teacher.slug
        terms = teacher.license.partition(" (")[0] + ", gated" * teacher.gated
        rows.append((name, teacher.image_tower, teacher.text_tower, str(teacher.dim), terms, teacher.source))
    header = ("name", "image tower", "text tower", "width", "license", "source")
    lines = [line[2:] for line in table_lines(header, rows, words=header)]
    nine, others = 1 + len(groups["the_nine"]), len(lines) - len(groups["encoders"])
    click.echo("\n".join([*lines[:nine], "", "variants, not part of `--teachers all`:", *lines[nine:others]]))
    click.echo("\n".join(["", "other public encoders, not part of `--teachers all`:", *lines[others:]]))
    click.echo("\n* inferred to be the ninth: no file of the original's release names it")


@teachers.command()
@click.argument("slug")
@JSON
def show(slug: str, as_json: bool) -> None:
    """Show the facts about one teacher and the recipe that loads it (a YAML card has the same fields)."""
    spec = parse_teacher(slug)
    published = known_teacher(spec.slug)
    facts = published.model_dump(mode="json") if published else {}
    recipe = spec.model_dump(mode="json", exclude_defaults=True)
    if as_json:
        click.echo(json.dumps({"published": facts, "recipe": recipe}, indent=1))
        return
    if published:
        click.echo(_facts(published))
    click.echo("recipe\n" + indent(yaml.safe_dump(recipe, sort_keys=False), "  "), nl=False)


@teachers.command()
@click.argument("slug")
@click.option("--images", type=ANY_PATH, help="Pictures to run.  [default: synthetic ones]")
@click.option("--golden", type=ANY_PATH, help="Folder of the original's samples to compare with.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
@_TRUST
@JSON
def check(slug: str, images: Path | None, golden: Path | None, device: str, trust_pickle: bool, as_json: bool) -> None:
    """Find or download the weights, load them strictly and run them. Exit status 1 if something is wrong.

    SLUG is what `--teachers` takes: a name, NAME=local-dir:/path, NAME=hf-hub:org/name or a YAML card.
    """
    from mmkd.extract.teachers.check import check_teacher

    spec = parse_teacher(slug).model_copy(update={"trust_pickle": trust_pickle})
    try:
        report = check_teacher(spec, _device(device), images, golden)
    except TeacherError as error:
        raise TeacherError(f"{spec.slug} was not checked: {error}") from error
    click.echo(json.dumps(asdict(report) | {"sound": report.sound}, indent=1) if as_json else _screen(report))
    if not report.sound:
        sys.exit(1)


@teachers.command()
@click.argument("slug")
@click.argument("folder", type=ANY_PATH)
@_TRUST
def convert(slug: str, folder: Path, trust_pickle: bool) -> None:
    """Copy a teacher's files to FOLDER with its weights as safetensors; its digest stays the same."""
    from mmkd.extract.teachers.convert import convert_teacher

    spec = parse_teacher(slug).model_copy(update={"trust_pickle": trust_pickle})
    card = convert_teacher(spec, folder)
    click.echo(f"{spec.slug}: digest {card.digest}; use it as --teachers {spec.slug}=local-dir:{folder}")


@teachers.command()
@click.argument("store", metavar="STORE")
@click.argument("slug")
@click.option("-n", "--rows", type=click.IntRange(min=1), help="Random rows to run again.  [default: 200]")
@click.option("--corpus", help="Current location of the corpus or of its images.  [default: as recorded]")
@click.option(
    "--tolerance", type=click.FloatRange(0, 2), help="Largest accepted 1 - cosine of a row.  [default: 0.001]"
)
@SEED
@JSON
def compare(
    store: str, slug: str, rows: int | None, corpus: str | None, tolerance: float | None, seed: int, as_json: bool
) -> None:
    """Run a teacher again on random rows of STORE; exit status 1 if a feature or the teacher's digest differs.

    SLUG is a teacher of the store, or NAME=local-dir:FOLDER where its files lie now.
    """
    from mmkd.extract.reextract import ROWS, TOLERANCE, compare_with_teacher

    limit = TOLERANCE if tolerance is None else tolerance
    opened = FeatureStore.open(store)
    found = compare_with_teacher(opened, slug, rows or ROWS, corpus=corpus, tolerance=limit, seed=seed)
    content = asdict(found) | {"same_teacher": found.same_teacher, "sound": found.sound}
    echo(as_json, plain_values(content), found.lines())
    if not found.sound:
        sys.exit(1)


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TeacherError(f"there is no device {name!r}; write cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TeacherError(f"device {name!r}: no CUDA device is available here; leave --device out to run on the CPU")
    return device


def _facts(teacher: PublishedTeacher) -> str:
    lines = [
        f"{teacher.name} ({teacher.slug})",
        f"also called   {', '.join(teacher.also_called) or '-'}",
        f"source        {teacher.source}" + (f" at {teacher.revision}" if teacher.revision else ""),
        *(["access        gated: accept the terms there, then run `hf auth login`"] if teacher.gated else []),
        f"image tower   {teacher.image_tower}",
        f"text tower    {teacher.text_tower}{': no text features, no zero-shot' * (teacher.text_tower == 'none')}",
        f"width         {teacher.dim}",
        *([f"tokenizer     {teacher.tokenizer}, cut to {teacher.context} tokens"] * (teacher.text_tower != "none")),
        *([f"pixels        {teacher.pixels}"] * (teacher.image_tower != "none")),
        f"files         {', '.join(teacher.files)}",
        f"sha256        {teacher.weights_sha256 or 'none published that we know of'}",
        f"license       {teacher.license}",
        f"paper         {teacher.paper}",
        *(f"known from    {source}" for source in teacher.sources),
        *(f"open          {question}" for question in teacher.open_questions),
    ]
    return "\n".join(lines)


def _screen(report: "CheckReport") -> str:
    size = "{} x {} pixels, ".format(*report.image_size) if report.image_size else "no image tower, "
    cut = {"text": f"; {report.captions_cut} cut to the context"}
    context = f"{report.context_length} tokens" if "text" in report.towers else "no text tower"
    count = f"{report.parameters:,} parameters, " if report.parameters is not None else ""
    scale = f"{report.logit_scale:.2f}" if report.logit_scale is not None else "not in the files"
    scale = f", logit scale {scale}" if len(report.towers) > 1 else ""  # which compares images with texts
    lines = [
        f"{report.slug}: loaded from {report.source} in {report.load_seconds:.1f} s, every weight accounted for",
        f"digest        {report.digest} ({report.loader})",
        f"model         {count}width {report.dim}, {size}{context}{scale}",
        *(_tower(TOWER_INPUTS[tower], found) + cut.get(tower, "") for tower, found in report.towers.items()),
        f"peak memory   {report.peak_memory_bytes / 2**20:,.0f} MiB",
    ]
    if golden := report.golden:
        image, text = golden.smallest_image_cosine, golden.smallest_text_cosine
        cosines = f", smallest cosine {image:.5f} (image) {text:.5f} (text)" if golden.samples else ""
        lines.append(f"published     {golden.verdict}: {golden.samples} samples{cosines}")
    elif report.open_questions:
        questions = "; ".join(report.open_questions)
        lines.append(f"open          --golden FOLDER of the original's samples would settle: {questions}")
    return "\n".join(lines)


def _tower(name: str, tower: "TowerReport") -> str:
    half = ", ".join(f"{count} NaN in {precision}" for precision, count in tower.not_finite_in_half.items() if count)
    counts = ((tower.not_finite, "NaN"), (tower.beyond_float16, "too large for float16"))
    troubles = [f"{count} {what}" for count, what in counts if count] + [half] * bool(half)
    said = "".join(f"; {trouble}" for trouble in troubles)
    return (
        f"{name:13} {tower.inputs} run, norms {tower.norm_smallest:.3f} to {tower.norm_largest:.3f}, "
        f"{tower.per_second:.1f} a second{said}"
    )
