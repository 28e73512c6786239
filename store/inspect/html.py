"""Stores and statistics as HTML tables for notebooks; every text is escaped."""

from html import escape

from mmkd.base.text import html_table, number
from mmkd.store.inspect.findings import statistics_findings
from mmkd.store.inspect.pairs import modality_names
from mmkd.store.inspect.statistics import StoreStatistics
from mmkd.store.layout import TOWER_INPUTS


def statistics_html(statistics: StoreStatistics) -> str:
    """Return findings, towers, pairs and agreement as accessible tables without any script or style of a page."""
    parts = [f"<p><strong>{escape(statistics.root)}</strong>: {statistics.drawn}</p>"]
    parts += [
        f"<p><strong>{finding.severity}</strong>: {escape(finding.text)}</p>"
        for finding in sorted(statistics_findings(statistics), key=lambda finding: finding.severity)
    ]
    features = ("features", "rows", "broken", "median norm", "mean cosine", "effective rank", "dead", "repeats")
    towers = [
        (f"{t.slug} {t.tower}", f"{t.rows:,}", f"{t.not_finite + t.zero:,}", number(t.norms.median),
         number(t.mean_cosine), f"{number(t.effective_rank, 1)} of {t.width}",
         str(len(t.dead_dimensions) + len(t.constant_dimensions)), f"{t.repeated_rows:,}")
        for t in statistics.towers
    ]  # fmt: skip
    parts.append(html_table("Features", features, towers))
    teachers = ("teacher", "pairs", "matched cosine", "unmatched", "pool", "i2t@1", "i2t@10", "t2i@1", "t2i@10")
    pairs = [
        (p.slug, f"{p.pairs:,}", number(p.matched.median), number(p.unmatched.median), str(p.pool),
         *(number(100 * value, 1) + " %" for value in p.recall.values()))
        for p in statistics.pairs
    ]  # fmt: skip
    parts.append(html_table("Images against captions", teachers, pairs))
    if names := modality_names(statistics.pairs):
        known = [{each.modality: each.recall["i2t@10"] for each in pair.modalities} for pair in statistics.pairs]
        recalls = [
            (name, *(number(100 * one[name], 1) + " %" if name in one else "-" for one in known)) for name in names
        ]
        slugs = [pair.slug for pair in statistics.pairs]
        parts.append(html_table("Image to caption R@10 by modality", ("modality", *slugs), recalls))
    for matrix in statistics.agreement:
        rows = zip(matrix.teachers, matrix.cka.tolist(), strict=True)
        cells = [(slug, *(number(value, 2) for value in row)) for slug, row in rows]
        parts.append(html_table(f"Linear CKA of {TOWER_INPUTS[matrix.tower]}", ("teacher", *matrix.teachers), cells))
    for table in statistics.tables.values():
        parts.append(html_table(table.title.capitalize(), table.header, table.text_rows()))
    return "".join(parts)
