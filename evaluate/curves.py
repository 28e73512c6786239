"""Figures that are drawn from predictions, one panel per data set."""

from __future__ import annotations

import warnings
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import CensoredData, ecdf, logrank

from mmkd.base.errors import ConfigError
from mmkd.evaluate.drawing import BLUE, VERMILLION
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.statistics import TOLERANCE, p_text


def kaplan_meier(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Curves of both halves by risk (see `high_risk`) with 95 % bands and the log-rank test, one panel per data set;
    the first draw of the folds."""
    if question.task != "survival":
        raise ConfigError(f"Kaplan-Meier curves are of task survival, not {question.task!r}; give --task survival")
    panels = []
    for spec in folder.datasets(question):
        draws = folder.answers(question, spec.dataset, model)
        if isinstance(draws, str):
            raise ConfigError(f"{model} has no survival predictions on {spec.dataset}: {draws}")
        panels.append((spec.dataset, draws[0].take(draws[0].available)))
        if not high_risk(panels[-1][1]).any():
            raise ConfigError(f"{model} gives all patients of {spec.dataset} one risk: there are no halves to draw")
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (dataset, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _survival_panel(axes, f"{dataset}: {model}", found)
    return figure


def high_risk(found: Predictions) -> NDArray[np.bool_]:
    """Patients above the median risk of their fold, bool (n,); risks of two folds are not on one scale."""
    risk = found.column("risk")
    fold = np.zeros(len(found), dtype=np.int64) if found.fold is None else found.fold
    high = np.zeros(len(found), dtype=bool)
    for number in np.unique(fold):
        mask = fold == number
        high[mask] = risk[mask] - np.median(risk[mask]) > TOLERANCE
    return high


def band(group: CensoredData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return pointwise 95 % limits of a curve at each of its times, by Greenwood's variance on the log-log scale.
    Kalbfleisch and Prentice 2002, section 1.4. NaN where the curve is at one or at zero: there they do not exist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy takes the logarithm of zero for those points
        limits = ecdf(group).sf.confidence_interval(0.95, method="log-log")
    return limits.low.probabilities, limits.high.probabilities


def _survival_panel(axes: Axes, title: str, found: Predictions) -> None:
    high = high_risk(found)
    groups = []
    for mask, name, color, style in ((high, "high risk", VERMILLION, "-"), (~high, "low risk", BLUE, "--")):
        time, event = found.column("time")[mask], found.column("event")[mask] > 0
        groups.append(CensoredData(uncensored=time[event], right=time[~event]))
        survival = ecdf(groups[-1]).sf
        label = f"{name} (n={mask.sum()}, {event.sum()} events)"
        axes.step(
            np.concatenate([[0.0], survival.quantiles]), np.concatenate([[1.0], survival.probabilities]),
            where="post", color=color, linestyle=style, label=label,
        )  # fmt: skip
        limits = band(groups[-1])
        for limit in limits:
            if len(limit) > 1 and np.isnan(limit[-1]):  # at zero, the previous limit holds
                limit[-1] = limit[-2]
        axes.fill_between(survival.quantiles, *limits, step="post", color=color, alpha=0.15, linewidth=0)
        censored = np.sort(time[~event])
        axes.plot(censored, survival.evaluate(censored), "|", color=color, markersize=5)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("time (unit of the table)", fontsize=8)
    axes.set_ylabel("share alive", fontsize=8)
    axes.set_title(fill(f"{title}; log-rank p={p_text(logrank(*groups).pvalue)}", 60), fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="upper right", title="with 95% bands", title_fontsize=8)
