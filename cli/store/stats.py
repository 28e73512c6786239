"""`mmkd store stats`: statistics of the features."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import click

from mmkd.base.places.remote import StorePath
from mmkd.base.text import number, percent, table_lines
from mmkd.cli.params import JSON, SAMPLE, SEED, STORE_PATH, TEACHERS, Names, echo, progress_bar
from mmkd.cli.store.info import finding_lines
from mmkd.store import FeatureStore
from mmkd.store.inspect.agreement import MIN_SHARED
from mmkd.store.inspect.findings import Finding, statistics_findings, store_findings
from mmkd.store.inspect.info import store_info
from mmkd.store.inspect.pairs import ModalityPairs, modality_names
from mmkd.store.inspect.statistics import StoreStatistics, store_statistics
from mmkd.store.layout import TOWER_INPUTS


@click.command()
@STORE_PATH
@TEACHERS
@SAMPLE(default="8192")
@SEED
@JSON
def stats(path: StorePath, teachers: Names, sample: int | None, seed: int, as_json: bool) -> None:
    """Norms, cosines, retrieval, isotropy, repeats, dead dimensions, and how far teachers agree."""
    with progress_bar("teacher", hidden=as_json) as progress:
        opened = FeatureStore.open(path)
        found = store_statistics(opened, teachers, sample, seed, progress)
    findings = [*store_findings(store_info(opened)), *statistics_findings(found)]
    content = found.as_json() | {"findings": [asdict(finding) for finding in findings]}
    echo(as_json, content, _lines(found, findings))


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
    yield from finding_lines(findings)
    if not findings:
        yield "nothing conspicuous"


def _numbered(slugs: Sequence[str]) -> list[str]:
    """Return teachers with the numbers that head the columns of the tables below; one alone needs none."""
    return [f"{i} {slug}" for i, slug in enumerate(slugs, 1)] if len(slugs) > 1 else list(slugs)


def _modality_lines(found: StoreStatistics) -> Iterator[str]:
    """Yield teachers by modality, where the sample table states more than one."""
    if not (names := modality_names(found.pairs)):
        return
    known = [{each.modality: each for each in pair.modalities} for pair in found.pairs]
    header = ("modality", *(str(i + 1) for i in range(len(known))))
    titles: dict[str, Callable[[ModalityPairs], str]] = {
        "median cosine of images with their own captions": lambda pairs: number(pairs.matched, 2),
        "i2t@10, in pools of all modalities": lambda pairs: percent(pairs.recall["i2t@10"]),
    }
    for title, cell in titles.items():
        yield f"by modality: {title}"
        rows = [(name, *(cell(one[name]) if name in one else "-" for one in known)) for name in names]
        yield from table_lines(header, rows)


def _agreement_lines(found: StoreStatistics) -> Iterator[str]:
    if len(found.pairs) < 2:
        return
    compared = [matrix for matrix in found.agreement if matrix.compared]
    if not compared:
        yield f"agreement needs two teachers that share at least {MIN_SHARED} sound rows"
    for matrix in compared:
        count = len(matrix.teachers)
        title = f"{TOWER_INPUTS[matrix.tower]}: linear CKA above, mutual {matrix.k} neighbors below"
        yield f"{title} (at most {found.agreement_rows:,} rows)"
        rows = []
        for i, label in enumerate(_numbered(matrix.teachers)):
            values = (float((matrix.cka if j > i else matrix.mutual)[i, j]) for j in range(count))
            rows.append((label, *("" if i == j else number(value, 2) for j, value in enumerate(values))))
        yield from table_lines(("", *(str(i + 1) for i in range(count))), rows)
