"""The page's charts as Plotly figures. Colors of text and grid are set in the page, by light or dark."""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mmkd.base.arrays import Floats
from mmkd.base.text import plain_values
from mmkd.store.inspect.agreement import Agreement
from mmkd.store.inspect.coverage import Coverage
from mmkd.store.inspect.pairs import PairStatistics, modality_names
from mmkd.store.inspect.projection import Projection
from mmkd.store.inspect.towers import TowerStatistics
from mmkd.store.layout import TOWER_INPUTS, TOWERS

# Okabe and Ito's colors, distinguished by color-blind readers on light and dark ground alike.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"

_HOLE = -0.25
# From missing (a color of its own, with a sharp edge) over empty to full.
_COVERAGE_SCALE = [(0.0, VERMILION), (0.19, VERMILION), (0.19, "#cfe3f3"), (1.0, BLUE)]

# Light enough at its end for the figures in the cells (contrast above 6), on light and dark pages alike.
_AGREEMENT_SCALE, _INK = [(0.0, "#f3f7fb"), (1.0, "#6baed6")], "#16202c"

Chart = dict[str, Any]
"""A Plotly figure as plain values."""


def coverage_chart(found: Coverage) -> Chart:
    """Return teachers by shards: sound rows of the fuller tower; holes in their own color."""
    z = np.where(found.done, found.fuller, _HOLE)
    shares = [(TOWER_INPUTS[tower], share) for tower, share in found.share.items()]

    def words(t: int, shard: int) -> str:
        asked = [f"{name} {share[t, shard]:.1%}" for name, share in shares if not np.isnan(share[t, shard])]
        return f"{', '.join(asked) or 'nothing asked for'} sound" if found.done[t, shard] else "missing"

    hover = [
        [f"{slug}, shard {shard}<br>{words(t, shard)}" for shard in range(len(found.rows))]
        for t, slug in enumerate(found.teachers)
    ]
    trace = go.Heatmap(
        z=z, y=list(found.teachers), zmin=_HOLE, zmax=1, colorscale=_COVERAGE_SCALE, text=hover, hoverinfo="text",
        xgap=1 if len(found.rows) <= 200 else 0, ygap=2, showscale=False,
    )  # fmt: skip
    figure = go.Figure(trace)
    shards = len(found.rows)
    step = 1 if shards <= 20 else 10 if shards <= 200 else 100 if shards <= 2000 else 1000
    figure.update_xaxes(title_text="shard", constrain="domain", tickformat="d", dtick=step)
    figure.update_yaxes(autorange="reversed")
    return _plain(figure, 68 + 26 * len(found.teachers), top=8)


def cosine_chart(pairs: PairStatistics) -> Chart:
    """Return histograms of matched and unmatched cosines of one teacher."""
    figure = go.Figure()
    for name, found, color, dash in (
        ("matched", pairs.matched, BLUE, "solid"),
        ("unmatched", pairs.unmatched, ORANGE, "dot"),
    ):
        if found.count:
            edges = np.array(found.edges)
            figure.add_scatter(
                x=np.round((edges[1:] + edges[:-1]) / 2, 5), y=np.array(found.counts) / found.count,
                name=name, mode="lines", fill="tozeroy",
                line={"color": color, "dash": dash, "shape": "hvh", "width": 2},
                hovertemplate="%{x:.2f}: %{y:.1%}",
            )  # fmt: skip
    low, high = min(pairs.matched.minimum, pairs.unmatched.minimum), max(pairs.matched.maximum, pairs.unmatched.maximum)
    if np.isfinite(low) and np.isfinite(high):
        figure.update_xaxes(range=[max(-1.0, low - 0.08), min(1.0, high + 0.08)])
    figure.update_xaxes(title_text="cosine")
    figure.update_yaxes(tickformat=".0%", title_text="share", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": 1.15, "x": 0}, hovermode="x unified")
    return _plain(figure, 240)


def norm_chart(towers: tuple[TowerStatistics, ...]) -> Chart:
    """Return quantiles of the norms of every tower, as boxes."""
    figure = go.Figure()
    for tower, color in zip(TOWERS, (BLUE, ORANGE), strict=True):
        chosen = [t for t in towers if t.tower == tower and t.norms.count]
        if chosen:
            figure.add_box(
                name=TOWER_INPUTS[tower], orientation="h", y=[t.slug for t in chosen],
                lowerfence=[t.norms.q01 for t in chosen], q1=[t.norms.q25 for t in chosen],
                median=[t.norms.median for t in chosen], q3=[t.norms.q75 for t in chosen],
                upperfence=[t.norms.q99 for t in chosen], marker={"color": color},
            )  # fmt: skip
    figure.update_layout(boxmode="group", legend={"orientation": "h", "y": 1.12, "x": 0})
    figure.update_xaxes(title_text="norm (1, 25, 50, 75, 99 %)", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return _plain(figure, 130 + 46 * len({t.slug for t in towers}))


def agreement_chart(found: Agreement, values: Floats, name: str) -> Chart:
    """Return teachers by teachers, the values written into the cells."""
    hover = [
        [
            f"{first} and {second}<br>{name} {values[i, j]:.3f}<br>{found.rows[i, j]:,} rows"
            for j, second in enumerate(found.teachers)
        ]
        for i, first in enumerate(found.teachers)
    ]
    return _cells(values, found.teachers, found.teachers, hover, "{:.2f}")


def modality_chart(pairs: Sequence[PairStatistics]) -> Chart:
    """Return modalities by teachers: recall of the caption among the first ten, written into the cells."""
    names = modality_names(pairs)
    labels = [html.escape(name, quote=False) for name in names]  # Plotly reads a few tags in names
    recall, hover = np.full((len(names), len(pairs)), np.nan), np.full((len(names), len(pairs)), "", dtype=object)
    for j, pair in enumerate(pairs):
        known = {each.modality: each for each in pair.modalities}
        for i, (name, label) in enumerate(zip(names, labels, strict=True)):
            hover[i, j] = f"{pair.slug}, {label}<br>no pairs"
            if name in known:
                each = known[name]
                recall[i, j] = each.recall["i2t@10"]
                hover[i, j] = (
                    f"{pair.slug}, {label}<br>R@10 {recall[i, j]:.1%}, {each.pairs:,} pairs<br>"
                    f"median cosine {each.matched:.3f}, with other captions {each.unmatched:.3f}"
                )
    return _cells(recall, [pair.slug for pair in pairs], labels, hover.tolist(), "{:.0%}")


def _cells(values: Floats, columns: Sequence[str], rows: Sequence[str], hover: list[list[str]], cell: str) -> Chart:
    """Return a table of numbers from 0 to 1 as colored cells, each with its number in the format `cell`."""
    trace = go.Heatmap(
        z=np.round(values, 4), x=list(columns), y=list(rows), zmin=0, zmax=1, colorscale=_AGREEMENT_SCALE,
        text=[["" if math.isnan(value) else cell.format(value) for value in row] for row in values.tolist()],
        textfont={"color": _INK}, texttemplate="%{text}" if len(columns) <= 12 else None,
        customdata=hover, hovertemplate="%{customdata}<extra></extra>", showscale=False, xgap=1, ygap=1,
    )  # fmt: skip
    figure = go.Figure(trace)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(tickangle=-45, type="category")
    return _plain(figure, 130 + 34 * len(rows), top=8)


def map_points(found: Projection) -> dict[str, Any]:
    """Return coordinates of one map, four digits, for the page's own coloring."""
    points = np.round(found.points.astype(np.float64), 4)
    about = {"teacher": found.slug, "tower": found.tower, "method": found.method, "explained": found.explained}
    return about | {"rows": found.rows.tolist(), "x": points[:, 0].tolist(), "y": points[:, 1].tolist()}


def _plain(figure: go.Figure, height: int, top: int = 30) -> Chart:
    # Room for labels is found by `automargin`; ground is the page's own.
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": top, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        dragmode=False,
    )
    return plain_values(figure.to_dict())
