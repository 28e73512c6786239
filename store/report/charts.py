"""The page's charts as Plotly figures. Colors of text and grid are set in the page, by light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

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
    """Return teachers by shards: sound image rows (captions where a teacher has no images); holes in their own
    color."""
    share = np.maximum(found.image, found.text)
    z = np.where(found.done, share, _HOLE)
    hover = [
        [
            f"{slug}, shard {shard}<br>"
            + (
                f"images {found.image[t, shard]:.1%}, captions {found.text[t, shard]:.1%} sound"
                if found.done[t, shard]
                else "missing"
            )
            for shard in range(len(found.rows))
        ]
        for t, slug in enumerate(found.teachers)
    ]
    trace = go.Heatmap(
        z=z, y=list(found.teachers), zmin=_HOLE, zmax=1, colorscale=_COVERAGE_SCALE, text=hover, hoverinfo="text",
        xgap=1 if len(found.rows) <= 200 else 0, ygap=2, showscale=False,
    )  # fmt: skip
    figure = go.Figure(trace)
    figure.update_xaxes(title_text="shard", constrain="domain", tickformat="d", dtick=_step(len(found.rows)))
    figure.update_yaxes(autorange="reversed")
    return _plain(figure, 68 + 26 * len(found.teachers), top=8)


def cosine_chart(pairs: PairStatistics) -> Chart:
    """Return histograms of matched and unmatched cosines of one teacher."""
    figure = go.Figure()
    for name, found, colour, dash in (
        ("matched", pairs.matched, BLUE, "solid"),
        ("unmatched", pairs.unmatched, ORANGE, "dot"),
    ):
        if found.count:
            share = np.array(found.counts) / found.count
            figure.add_scatter(
                x=_middles(found.edges), y=share, name=name, mode="lines", fill="tozeroy",
                line={"color": colour, "dash": dash, "shape": "hvh", "width": 2},
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
    for tower, colour in zip(TOWERS, (BLUE, ORANGE), strict=True):
        chosen = [t for t in towers if t.tower == tower and t.norms.count]
        if chosen:
            figure.add_box(
                name=TOWER_INPUTS[tower], orientation="h", y=[t.slug for t in chosen],
                lowerfence=[t.norms.q01 for t in chosen], q1=[t.norms.q25 for t in chosen],
                median=[t.norms.median for t in chosen], q3=[t.norms.q75 for t in chosen],
                upperfence=[t.norms.q99 for t in chosen], marker={"color": colour},
            )  # fmt: skip
    figure.update_layout(boxmode="group", legend={"orientation": "h", "y": 1.12, "x": 0})
    figure.update_xaxes(title_text="norm (1, 25, 50, 75, 99 %)", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return _plain(figure, 130 + 46 * len({t.slug for t in towers}))


def agreement_chart(found: Agreement, values: NDArray[np.float64], name: str) -> Chart:
    """Return teachers by teachers, the figures written into the cells."""
    count = len(found.teachers)
    hover = [
        [
            f"{found.teachers[i]} and {found.teachers[j]}<br>{name} {values[i, j]:.3f}<br>{found.rows[i, j]:,} rows"
            for j in range(count)
        ]
        for i in range(count)
    ]
    text = [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values.tolist()]
    trace = go.Heatmap(
        z=np.round(values, 4), x=list(found.teachers), y=list(found.teachers),
        zmin=0, zmax=1, colorscale=_AGREEMENT_SCALE,
        text=text, textfont={"color": _INK}, texttemplate="%{text}" if count <= 12 else None,
        customdata=hover, hovertemplate="%{customdata}<extra></extra>", showscale=False, xgap=1, ygap=1,
    )  # fmt: skip
    return _cells(trace, count)


def modality_chart(pairs: Sequence[PairStatistics]) -> Chart:
    """Return modalities by teachers: recall of the caption among the first ten, the figures written into the cells."""
    names = modality_names(pairs)
    known = [{each.modality: each for each in pair.modalities} for pair in pairs]
    recall = [[one[name].recall["i2t@10"] if name in one else math.nan for one in known] for name in names]
    hover = [
        [
            f"{pair.slug}, {_text(name)}<br>R@10 {one[name].recall['i2t@10']:.1%}, {one[name].pairs:,} pairs<br>"
            f"median cosine {one[name].matched:.3f}, with other captions {one[name].unmatched:.3f}"
            if name in one
            else f"{pair.slug}, {_text(name)}<br>no pairs"
            for pair, one in zip(pairs, known, strict=True)
        ]
        for name in names
    ]
    trace = go.Heatmap(
        z=np.round(recall, 4), x=[pair.slug for pair in pairs], y=[_text(name) for name in names],
        zmin=0, zmax=1, colorscale=_AGREEMENT_SCALE,
        text=[["" if math.isnan(value) else f"{value:.0%}" for value in row] for row in recall],
        textfont={"color": _INK}, texttemplate="%{text}" if len(pairs) <= 12 else None,
        customdata=hover, hovertemplate="%{customdata}<extra></extra>", showscale=False, xgap=1, ygap=1,
    )  # fmt: skip
    return _cells(trace, len(names))


def _cells(trace: go.Heatmap, rows: int) -> Chart:
    figure = go.Figure(trace)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(tickangle=-45, type="category")
    return _plain(figure, 130 + 34 * rows, top=8)


def _text(name: str) -> str:
    """Return a label from the store as text: Plotly reads a few tags in names."""
    return html.escape(name, quote=False)


def map_points(found: Projection) -> dict[str, Any]:
    """Return coordinates of one map, four digits, for the page's own colouring."""
    points = np.round(found.points.astype(np.float64), 4)
    return {
        "teacher": found.slug,
        "tower": found.tower,
        "method": found.method,
        "explained": found.explained,
        "rows": found.rows.tolist(),
        "x": points[:, 0].tolist(),
        "y": points[:, 1].tolist(),
    }


def _middles(edges: tuple[float, ...]) -> list[float]:
    values = np.array(edges)
    middles: list[float] = np.round((values[1:] + values[:-1]) / 2, 5).tolist()
    return middles


def _step(shards: int) -> int:
    return 1 if shards <= 20 else 10 if shards <= 200 else 100 if shards <= 2000 else 1000


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
    plain: Chart = plain_values(figure.to_dict())
    return plain
