"""Statistics as the tables that the screen and notebooks show."""

from collections.abc import Callable, Iterator, Sequence
from html import escape

from mmkd.base.text import html_table, number, percent
from mmkd.store.inspect.agreement import Agreement
from mmkd.store.inspect.findings import statistics_findings
from mmkd.store.inspect.pairs import ModalityPairs, PairStatistics, modality_names
from mmkd.store.inspect.statistics import StoreStatistics
from mmkd.store.inspect.table import StatisticTable
from mmkd.store.inspect.towers import TowerStatistics
from mmkd.store.layout import TOWER_INPUTS


def statistics_tables(found: StoreStatistics) -> Iterator[StatisticTable]:
    """Yield towers, pairs, modalities where the sample table states several, agreement, and further statistics. Of
    several teachers each has a number, which heads its column of the later tables."""
    header = ("features", "rows", "broken", "norm 1%", "median", "99%", "mean cos", "eff. rank", "dead", "repeats")
    yield StatisticTable(found.repeated, header, [_tower(tower) for tower in found.towers])
    header = ("teacher", "pairs", "matched", "unmatched", "pool", "i2t@1", "i2t@10", "t2i@1", "t2i@10", "best shift")
    labels = _numbered([pair.slug for pair in found.pairs])
    pairs = [(label, *_pair(pair)) for label, pair in zip(labels, found.pairs, strict=True)]
    yield StatisticTable("images against captions", header, pairs)
    if names := modality_names(found.pairs):
        known = [{each.modality: each for each in pair.modalities} for pair in found.pairs]
        titles: dict[str, Callable[[ModalityPairs], str]] = {
            "median cosine of images with their own captions": lambda pairs: number(pairs.matched, 2),
            "i2t@10, in pools of all modalities": lambda pairs: percent(pairs.recall["i2t@10"]),
        }
        for title, cell in titles.items():
            rows = [(name, *(cell(one[name]) if name in one else "-" for one in known)) for name in names]
            yield StatisticTable(f"by modality: {title}", ("modality", *_numbers(len(known))), rows)
    for matrix in found.agreement:
        if matrix.compared:
            yield _agreement(matrix, found.agreement_rows)
    yield from found.tables.values()


def statistics_html(found: StoreStatistics) -> str:
    """Return findings and tables as accessible HTML, without any script or style of a page; every text is escaped."""
    findings = sorted(statistics_findings(found), key=lambda finding: finding.severity)
    parts = [f"<p><strong>{escape(found.root)}</strong>: {found.drawn}</p>"]
    parts += [f"<p><strong>{finding.severity}</strong>: {escape(finding.text)}</p>" for finding in findings]
    parts += [html_table(table.title, table.header, table.text_rows()) for table in statistics_tables(found)]
    return "".join(parts)


def _tower(tower: TowerStatistics) -> tuple[str, ...]:
    return (
        f"{tower.slug} {tower.tower}", f"{tower.rows:,}", f"{tower.not_finite + tower.zero:,}",
        number(tower.norms.q01), number(tower.norms.median), number(tower.norms.q99),
        number(tower.mean_cosine), f"{number(tower.effective_rank, 1)}/{tower.width}",
        str(len(tower.dead_dimensions) + len(tower.constant_dimensions)), f"{tower.repeated_rows:,}",
    )  # fmt: skip


def _pair(pair: PairStatistics) -> tuple[str, ...]:
    return (
        f"{pair.pairs:,}", number(pair.matched.median), number(pair.unmatched.median), f"{pair.pools} x {pair.pool}",
        *map(percent, pair.recall.values()), f"{pair.best_shift:+d}" if pair.best_shift else "0",
    )  # fmt: skip


def _agreement(matrix: Agreement, rows: int) -> StatisticTable:
    title = f"{TOWER_INPUTS[matrix.tower]}: linear CKA above, mutual {matrix.k} neighbors below (at most {rows:,} rows)"
    cells = []
    for i, label in enumerate(_numbered(matrix.teachers)):
        values = [*matrix.mutual[i, :i], None, *matrix.cka[i, i + 1 :]]
        cells.append((label, *("" if value is None else number(value, 2) for value in values)))
    return StatisticTable(title, ("", *_numbers(len(matrix.teachers))), cells)


def _numbered(slugs: Sequence[str]) -> list[str]:
    """Return teachers with their numbers; one alone needs none."""
    return [f"{i} {slug}" for i, slug in enumerate(slugs, 1)] if len(slugs) > 1 else list(slugs)


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(1, count + 1)]
