"""Figures that are drawn from predictions, one panel per data set."""

import warnings
from collections.abc import Callable
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import CensoredData, ecdf, logrank

from mmkd.base.arrays import Bools, Floats
from mmkd.base.errors import ConfigError
from mmkd.evaluate.calibration import bin_of, calibration_error, events
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.drawing import BLUE, GRAY, VERMILLION, line_style
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.evaluate.measured import calibrated, positive_score, probabilities
from mmkd.evaluate.metrics import ratio
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.statistics import TOLERANCE, p_text
from mmkd.evaluate.tasks import TASKS


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
    figure, places = _grid(len(panels))
    for axes, (dataset, found) in zip(places, panels, strict=True):
        _survival_panel(axes, f"{dataset}: {model}", found)
    return figure


def reliability(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Share of events over the mean probability in bins of equal width, with intervals, before and after temperature
    scaling; one panel per data set that asks for its calibration, the first draw of the labels or folds. Bars are the
    share of samples in each bin."""
    panels = _panels(folder, question, model, lambda spec: spec.measures.calibration is not None, "calibration")
    figure, places = _grid(len(panels))
    for axes, (spec, found) in zip(places, panels, strict=True):
        assert spec.measures.calibration is not None, "the panels are chosen by it"
        bins = spec.measures.calibration.bins
        series = [("as predicted", BLUE, "o-", probabilities(found))]
        if found.validation is not None:
            series.append((f"temperature {found.validation.temperature:.3g}", VERMILLION, "s--", calibrated(found)))
        resamples = _resamples(folder, question, spec, found)
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
        edges = np.linspace(0, 1, bins + 1)[:-1]
        for name, color, style, score in series:
            p, happened = events(found.labels(), score)
            member = np.eye(bins)[bin_of(p, edges)]
            size = member.sum(axis=0)
            filled = size > 0
            mean, share = (ratio(values @ member, size)[filled] for values in (p, happened.astype(np.float64)))
            drawn = ratio(resamples @ (member * happened[:, None]), resamples @ member)[:, filled]
            enough = (~np.isnan(drawn)).mean(axis=0) > 0.5
            level = folder.plan.suite.bootstrap.level
            tail = 50 * (1 - level)
            limits = np.nanpercentile(drawn[:, enough], [tail, 100 - tail], axis=0)
            error = calibration_error(p, happened, np.ones((1, len(p))), bins)[0]
            axes.plot(mean, share, style, color=color, markersize=4, label=f"{name}, ECE {error:.1%}")
            axes.vlines(mean[enough], *limits, color=color, linewidth=1)
            if name == series[0][0]:
                axes.bar(edges, size / size.sum(), 1 / bins, align="edge", color=GRAY, alpha=0.25, linewidth=0)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        of = f"P({found.columns[1]})" if len(found.columns) == 2 else "highest probability"
        _label(axes, f"{spec.dataset}: {model} (n={len(found)})", f"{of}; bars: samples", "share of events")
    return figure


def decision_curve(folder: ResultFolder, question: Question, model: str) -> Figure:
    """Net benefit over the threshold probability (Vickers and Elkin 2006) of all models, with a band of `model`,
    against treating all and none; one panel per data set that asks for operating points."""
    panels = _panels(folder, question, model, lambda spec: spec.measures.operating is not None, "operating")
    figure, places = _grid(len(panels))
    thresholds = np.arange(1, 100) / 100
    for axes, (spec, found) in zip(places, panels, strict=True):
        assert spec.measures.operating is not None, "the panels are chosen by it"
        positive = spec.measures.operating.positive
        for i, name in enumerate(folder.plan.models):
            answers = folder.answers(question, spec.dataset, name)
            if isinstance(answers, str):
                continue
            one = answers[0].take(answers[0].available)
            truth, score = positive_score(one, positive)
            gain = np.where(truth[:, None], 1.0, -thresholds / (1 - thresholds)) * (score[:, None] >= thresholds)
            style = {key: value for key, value in line_style(i).items() if key != "marker"}
            axes.plot(thresholds, gain.mean(axis=0), **style, linewidth=2.5 if name == model else 1, label=name)
            if name == model:
                weights = _resamples(folder, question, spec, found)
                tail = 50 * (1 - folder.plan.suite.bootstrap.level)
                limits = np.percentile((weights @ gain) / weights.sum(axis=1)[:, None], [tail, 100 - tail], axis=0)
                axes.fill_between(thresholds, *limits, color=style["color"], alpha=0.15, linewidth=0)
                share = truth.mean()
        everyone = share - (1 - share) * thresholds / (1 - thresholds)
        axes.plot(thresholds, everyone, color=GRAY, linestyle=":", label="treat all")
        axes.axhline(0, color="black", linewidth=0.8, label="treat none")
        axes.set(xlim=(0, 1), ylim=(-0.1 * share - 0.01, 1.1 * share + 0.01))
        title = f"{spec.dataset}: {' or '.join(positive)} (n={len(found)}, {truth.sum()} positive)"
        _label(axes, title, "threshold probability", "net benefit per sample")
    return figure


def _panels(
    folder: ResultFolder, question: Question, model: str, asks: Callable[[DatasetSpec], bool], measure: str
) -> list[tuple[DatasetSpec, Predictions]]:
    """Available predictions of `model` on each data set that asks for a measure."""
    if TASKS[question.task].answers != "classes":
        raise ConfigError(f"{question.task} predicts no probabilities of classes to draw; choose another --task")
    asking = [spec for spec in folder.datasets(question) if asks(spec)]
    if not asking:
        raise ConfigError(f"no data set of {question.task} asks for `measures: {measure}`")
    answers = {spec.dataset: folder.answers(question, spec.dataset, model) for spec in asking}
    found = [
        (spec, one[0].take(one[0].available)) for spec in asking if not isinstance(one := answers[spec.dataset], str)
    ]
    if not found:
        raise ConfigError(f"{model} has no predictions of {question.task}: {answers[asking[0].dataset]}")
    return found


def _resamples(folder: ResultFolder, question: Question, spec: DatasetSpec, found: Predictions) -> Floats:
    """Counts of the samples in all resamples, float64 (B, n)."""
    suite, scoring = folder.plan.suite, TASKS[question.task].scoring(spec)
    return np.concatenate(list(scoring.resamples(found, suite.bootstrap, suite.resample_name(spec.dataset))))


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels, at most three a row."""
    across = min(count, 3)
    down = -(-count // across)
    figure = Figure(figsize=(5 * across, 4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _label(axes: Axes, title: str, x: str, y: str, legend: dict[str, Any] | None = None) -> None:
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.set_title(fill(title, 60), fontsize=9, loc="left")
    axes.legend(fontsize=8, **(legend or {}))


def high_risk(found: Predictions) -> Bools:
    """Patients above the median risk of their fold, bool (n,); risks of two folds are not on one scale."""
    risk = found.column("risk")
    high = np.zeros(len(found), dtype=bool)
    for mask in found.fold_masks():
        high[mask] = risk[mask] - np.median(risk[mask]) > TOLERANCE
    return high


def band(group: CensoredData) -> tuple[Floats, Floats]:
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
    legend = {"loc": "upper right", "title": "with 95% bands", "title_fontsize": 8}
    head = f"{title}; log-rank p={p_text(logrank(*groups).pvalue)}"
    _label(axes, head, "time (unit of the table)", "share alive", legend)
