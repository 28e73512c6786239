"""Survival of the patients that a model gives a high and a low risk."""

from __future__ import annotations

import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import CensoredData, ecdf, logrank

from mmkd.base.errors import ConfigError
from mmkd.evaluate.figures.style import BLUE, VERMILLION
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.statistics import p_text


def kaplan_meier(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Kaplan-Meier curves of both halves by risk with 95 % bands, one panel a data set, with the log-rank test.

    Patients are halved at the median risk of their own fold, since risks of two folds are not on one scale. The first
    draw of the folds is shown.

    Raises:
        ConfigError: the suite has no survival task, or the model has no predictions.
    """
    if question.task != "survival":
        raise ConfigError(f"Kaplan-Meier curves are of task survival, not {question.task!r}; give --task survival")
    panels = []
    for spec in folder.datasets(question):
        found = folder.answers(question, spec.dataset, model)
        if isinstance(found, str):
            raise ConfigError(f"{model} has no survival predictions on {spec.dataset}: {found}")
        panels.append((spec.dataset, found[0].take(found[0].available)))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for i, (dataset, predictions) in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), i + 1), dataset, model, predictions)
    return figure


def high_risk(found: Predictions) -> NDArray[np.bool_]:
    """Patients above the median risk of their fold, bool (n,)."""
    risk = found.column("risk")
    fold = np.zeros(len(found), dtype=np.int64) if found.fold is None else found.fold
    high = np.zeros(len(found), dtype=bool)
    for number in np.unique(fold):
        mask = fold == number
        high[mask] = risk[mask] > np.median(risk[mask])
    return high


def band(group: CensoredData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pointwise 95 % limits of a curve at each of its times, by Greenwood's variance on the log-log scale.

    Kalbfleisch and Prentice 2002, section 1.4. NaN where the curve is at one or at zero: there they do not exist.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy takes the logarithm of zero for those points
        limits = ecdf(group).sf.confidence_interval(0.95, method="log-log")
    return limits.low.probabilities, limits.high.probabilities


def _held_to_the_end(limit: NDArray[np.float64]) -> NDArray[np.float64]:
    """A limit for drawing: where the curve ends at zero, the one before holds until then."""
    if len(limit) > 1 and np.isnan(limit[-1]):
        return np.append(limit[:-1], limit[-2])
    return limit


def _panel(axes: Axes, dataset: str, model: str, found: Predictions) -> None:
    high = high_risk(found)
    groups = []
    for mask, name, colour, style in ((high, "high risk", VERMILLION, "-"), (~high, "low risk", BLUE, "--")):
        time, event = found.column("time")[mask], found.column("event")[mask] > 0
        groups.append(CensoredData(uncensored=time[event], right=time[~event]))
        survival = ecdf(groups[-1]).sf
        label = f"{name} (n={mask.sum()}, {event.sum()} events)"
        axes.step(
            np.concatenate([[0.0], survival.quantiles]), np.concatenate([[1.0], survival.probabilities]),
            where="post", color=colour, linestyle=style, label=label,
        )  # fmt: skip
        low, upper = (_held_to_the_end(limit) for limit in band(groups[-1]))
        axes.fill_between(survival.quantiles, low, upper, step="post", color=colour, alpha=0.15, linewidth=0)
        censored = np.sort(time[~event])
        axes.plot(censored, survival.evaluate(censored), "|", color=colour, markersize=5)
    p = float(logrank(*groups).pvalue)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("time (unit of the table)", fontsize=8)
    axes.set_ylabel("share alive", fontsize=8)
    axes.set_title(f"{dataset}: {model}; log-rank p={p_text(p)}", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="upper right", title="with 95% bands", title_fontsize=8)
