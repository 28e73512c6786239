"""`mmkd store stats`: statistics of the features."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from mmkd.base.errors import ConfigError
from mmkd.base.text import number, percent, printable, table_lines
from mmkd.cli.params import STORE
from mmkd.cli.store.group import store
from mmkd.store.layout import TOWER_INPUTS

if TYPE_CHECKING:
    from mmkd.base.places.remote import StorePath
    from mmkd.store.inspect.agreement import Agreement
    from mmkd.store.inspect.findings import Finding
    from mmkd.store.inspect.pairs import ModalityPairs
    from mmkd.store.inspect.statistics import StoreStatistics


def sample_rows(text: str) -> int | None:
    """`all` as None, a number as itself. Raises ConfigError for anything else."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--sample {text!r} is neither a number of rows from 1 nor `all`")
    return int(text)


@store.command()
@click.argument("path", metavar="STORE", type=STORE)
@click.option("--teachers", help="Names, with commas between; all when not given.")
@click.option("--sample", default="8192", show_default=True, help="Rows to draw, or `all` to stream every row.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--json", "as_json", is_flag=True, help="All of it, with histograms, for programs.")
def stats(path: StorePath, teachers: str | None, sample: str, seed: int, as_json: bool) -> None:
    """Norms, cosines, retrieval, isotropy, repeats, dead dimensions, and how far teachers agree."""
    from mmkd.store import FeatureStore
    from mmkd.store.inspect.findings import statistics_findings, store_findings
    from mmkd.store.inspect.info import store_info
    from mmkd.store.inspect.statistics import store_statistics

    wanted = sample_rows(sample)
    with tqdm(unit="teacher", disable=True if as_json else None) as bar:

        def progress(done: int, every: int) -> None:
            bar.total = every
            bar.update(done - bar.n)

        opened = FeatureStore.open(path)
        found = store_statistics(opened, teachers.split(",") if teachers else None, wanted, seed, progress)
    findings = [*store_findings(store_info(opened)), *statistics_findings(found)]
    if as_json:
        click.echo(json.dumps(found.as_json() | {"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        click.echo("\n".join(_lines(found, findings)))


def _lines(found: StoreStatistics, findings: list[Finding]) -> Iterator[str]:
    yield f"{found.root}: {found.drawn}"
    yield f"whole store: {found.repeated_images:,} repeated images, {found.repeated_captions:,} repeated captions"
    header = ("features", "rows", "broken", "norm 1%", "median", "99%", "mean cos", "eff. rank", "dead", "repeats")
    yield from table_lines(
        header,
        [
            (
                f"{tower.slug} {tower.tower}", f"{tower.rows:,}", f"{tower.not_finite + tower.zero:,}",
                number(tower.norms.q01), number(tower.norms.median), number(tower.norms.q99),
                number(tower.mean_cosine), f"{number(tower.effective_rank, 1)}/{tower.width}",
                str(len(tower.dead_dimensions) + len(tower.constant_dimensions)), f"{tower.repeated_rows:,}",
            )
            for tower in found.towers
        ],
    )  # fmt: skip
    yield "images against captions"
    header = ("teacher", "pairs", "matched", "unmatched", "pool", "i2t@1", "i2t@10", "t2i@1", "t2i@10", "best shift")
    yield from table_lines(
        header,
        [
            (
                label, f"{pair.pairs:,}", number(pair.matched.median), number(pair.unmatched.median),
                f"{pair.pools} x {pair.pool}", *(percent(value) for value in pair.recall.values()),
                f"{pair.best_shift:+d}" if pair.best_shift else "0",
            )
            for label, pair in zip(_numbered([pair.slug for pair in found.pairs]), found.pairs, strict=True)
        ],
    )  # fmt: skip
    yield from _modality_lines(found)
    yield from _agreement_lines(found)
    for table in found.tables.values():
        yield table.title
        yield from table_lines(table.header, table.text_rows())
    from mmkd.cli.store.screen import finding_lines

    yield from finding_lines(findings)
    if not findings:
        yield "nothing conspicuous"


def _numbered(slugs: Sequence[str]) -> list[str]:
    """Return teachers with the numbers that head the columns of the tables below; one alone needs none."""
    return [f"{i} {slug}" for i, slug in enumerate(slugs, 1)] if len(slugs) > 1 else list(slugs)


def _modality_lines(found: StoreStatistics) -> Iterator[str]:
    """Yield teachers by modality, where the sample table states more than one."""
    from mmkd.store.inspect.pairs import modality_names

    names = modality_names(found.pairs)
    if not names:
        return
    known = [{each.modality: each for each in pair.modalities} for pair in found.pairs]
    header = ("modality", *(str(i + 1) for i in range(len(known))))
    titles: dict[str, Callable[[ModalityPairs], str]] = {
        "median cosine of images with their own captions": lambda pairs: number(pairs.matched, 2),
        "i2t@10, in pools of all modalities": lambda pairs: percent(pairs.recall["i2t@10"]),
    }
    for title, cell in titles.items():
        yield f"by modality: {title}"
        rows = [(printable(name), *(cell(one[name]) if name in one else "-" for one in known)) for name in names]
        yield from table_lines(header, rows)


def _agreement_lines(found: StoreStatistics) -> Iterator[str]:
    from mmkd.store.inspect.agreement import MIN_SHARED

    if len(found.pairs) < 2:
        return
    compared = [matrix for matrix in found.agreement if _compares(matrix)]
    if not compared:
        yield f"agreement needs two teachers that share at least {MIN_SHARED} sound rows"
    for matrix in compared:
        inputs = TOWER_INPUTS[matrix.tower]
        yield from _matrix(f"{inputs}: linear CKA above, mutual {matrix.k} neighbours below", matrix, found)


def _compares(matrix: Agreement) -> bool:
    count = len(matrix.teachers)
    return any(math.isfinite(matrix.cka[i, j]) for i in range(count) for j in range(i + 1, count))


def _matrix(title: str, matrix: Agreement, found: StoreStatistics) -> Iterator[str]:
    yield f"{title} (at most {found.agreement_rows:,} rows)"
    rows = []
    for i, label in enumerate(_numbered(matrix.teachers)):
        cells = [
            "" if i == j else number(float((matrix.cka if j > i else matrix.mutual)[i, j]), 2)
            for j in range(len(matrix.teachers))
        ]
        rows.append((label, *cells))
    yield from table_lines(("", *(str(i + 1) for i in range(len(rows)))), rows)
