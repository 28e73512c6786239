"""One page for each model about what its features follow: class or site."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from mmkd.base.files import write_atomically
from mmkd.base.text import number
from mmkd.evaluate.drawing import BLUE, GRAY, VERMILLION, rendered
from mmkd.evaluate.report import write_page
from mmkd.evaluate.statistics import p_text
from mmkd.evaluate.trust import MEASURES, ModelTrust, TrustReport


def write_trust(out: Path, report: TrustReport) -> list[Path]:
    """Write `DATASET.json` and a page for each model, `DATASET.MODEL.html`, into `out`; return their paths. Raises
    StoreError if the disk is full or read-only."""
    name = report.cohort.dataset
    written = [out / f"{name}.json"]
    write_atomically(written[0], report.as_json().encode())
    caption = "Left: over the number of neighbors k. Right: over the correlation of class and site in training."
    for one in report.models:
        markup = rendered(trust_figure(report, one), "svg").decode()
        written.append(out / f"{name}.{quote(one.model, safe='')}.html")
        write_page(
            written[-1],
            "trust.html",
            report=report,
            one=one,
            titles=MEASURES,
            differences=report.differences(one.model),
            svg=markup[markup.index("<svg") :],
            caption=caption,
            number=number,
            p=p_text,
        )
    return written


def trust_figure(report: TrustReport, one: ModelTrust) -> Figure:
    """Robustness index and k-NN accuracies over k; accuracy over Cramer's V of the training rows."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ks, index, biology, site = np.array(one.curve).T
    left.plot(ks, index, color=BLUE, label="robustness index")
    left.axhline(report.chance, color=BLUE, linestyle=":", linewidth=1, label="its chance value")
    left.plot(ks, biology, color=GRAY, linestyle="--", label=f"accuracy of {report.cohort.biology_column}"[:40])
    left.plot(ks, site, color=VERMILLION, linestyle="-.", label=f"accuracy of {report.cohort.confounder_column}"[:40])
    left.axvline(report.k, color=GRAY, linewidth=0.6)
    left.set(xlabel=f"k (used: {report.k})", ylim=(0, 1.02))
    left.legend(fontsize=7, loc="best")
    for column, label, color in ((1, "same sites", BLUE), (2, "other sites", VERMILLION)):
        values = [(level[0], level[column]) for level in one.drop]
        if values and not np.isnan([value for _, value in values]).any():
            right.plot(*zip(*values, strict=True), marker="o", color=color, label=label)
    right.set(xlabel="Cramér's V of class and site in training", ylabel="accuracy in test", ylim=(0, 1.02))
    if one.drop:
        right.legend(fontsize=7, loc="lower left")
    else:
        right.text(0.5, 0.5, "not measured", ha="center", transform=right.transAxes)
    return figure
