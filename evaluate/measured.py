"""Metrics of the measures that a data set asks for, added to those of its tasks."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from mmkd.base.arrays import Bools, Floats
from mmkd.base.errors import UserError
from mmkd.evaluate import calibration, metrics
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.measures import Operating
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import Contrast, Metric, Scoring
from mmkd.evaluate.splits import mean_over_folds
from mmkd.evaluate.statistics import FEWEST_GROUPS

Answers = Literal["", "classes", "labels", "survival"]
"""What a task predicts: probabilities of classes or of several labels, survival, or what only subgroups suit."""


def with_measures(scoring: Scoring, spec: DatasetSpec, answers: Answers, *, validated: bool) -> Scoring:
    """Return `scoring` with the measures of a data set. validated: predictions bring validation samples along."""
    wanted, found = spec.measures, dict[str, Metric]()
    if answers == "classes":
        if wanted.calibration is not None:
            found |= _calibration("", probabilities, wanted.calibration.bins)
            if wanted.calibration.temperature and validated:
                found |= _calibration("_t", calibrated, wanted.calibration.bins)
        if wanted.kappa:
            found["kappa"] = Metric(lambda one, weights: metrics.quadratic_kappa(one.labels(), one.score, weights))
        for share in wanted.conformal.coverage if wanted.conformal is not None and validated else ():
            found |= _conformal(share)
        if wanted.operating is not None:
            found |= _operating(wanted.operating)
    elif answers == "survival" and wanted.survival is not None:
        found |= _survival(wanted.survival.times)
    for column in wanted.subgroups:
        found |= _subgroups(column, scoring)
    return replace(scoring, metrics=scoring.metrics | found)


def measure_needs(spec: DatasetSpec, calibrated: list[bool]) -> Iterator[str]:
    """Yield what a description lacks for its measures. calibrated: for each of its tasks with probabilities, whether it
    answers for validation rows."""
    wanted, classes = spec.measures, list(spec.classes or ())
    if wanted.calibrates and calibrated and spec.rows.val is None:
        yield "a temperature and conformal sets are chosen on `rows: val`, which it does not have"
    elif wanted.calibrates and calibrated and not any(calibrated):
        yield "none of its tasks can choose a temperature or conformal sets; zero_shot and linear_probe can"
    if wanted.kappa and len(classes) < 2:
        yield "kappa needs `classes`, the grades from the lowest to the highest"
    if wanted.operating is not None:
        positive = wanted.operating.positive
        if unknown := [name for name in positive if name not in classes]:
            yield f"operating: positive {unknown[0]!r} is not one of the `classes` {', '.join(classes) or '(none)'}"
        elif set(positive) == set(classes):
            yield "operating: all classes are positive; name those that a finding means"


def probabilities(found: Predictions) -> Floats:
    """Return class probabilities, float64 (n, C). Raises UserError for scores that are not."""
    wrong = (found.score < 0).any(axis=1) | (np.abs(found.score.sum(axis=1) - 1) > 1e-4)
    if wrong.any():
        first = int(wrong.argmax())
        raise UserError(
            f"scores of {wrong.sum()} samples are not probabilities: {found.ids[first]!r} has "
            f"{', '.join(f'{one:.4g}' for one in found.score[first][:4])}; calibration needs values that add up to 1"
        )
    return found.score


def calibrated(found: Predictions) -> Floats:
    """Return probabilities at the temperature of the validation samples, float64 (n, C)."""
    assert found.validation is not None, "the description is checked for validation rows"
    return calibration.scaled(probabilities(found), found.validation.temperature)


def positive_score(found: Predictions, positive: tuple[str, ...]) -> tuple[Bools, Floats]:
    """Return whether samples are of a positive class, bool (n,), and the probability of these, float64 (n,)."""
    columns = [found.columns.index(name) for name in positive]
    return np.isin(found.labels(), columns), found.score[:, columns].sum(axis=1)


def _calibration(suffix: str, score_of: Callable[[Predictions], Floats], bins: int) -> dict[str, Metric]:
    def error(found: Predictions, weights: Floats, equal_mass: bool) -> Floats:
        p, happened = calibration.events(found.labels(), score_of(found))
        return calibration.calibration_error(p, happened, weights, bins, equal_mass=equal_mass)

    def brier(found: Predictions, weights: Floats) -> Floats:
        return calibration.brier(found.labels(), score_of(found), weights)

    def part(found: Predictions, weights: Floats, which: int) -> Floats:
        return calibration.brier_parts(found.labels(), score_of(found), weights, bins)[which]

    return {
        f"ece{suffix}@{bins}": Metric(partial(error, equal_mass=False), lower=True, centered=True),
        f"ece_mass{suffix}@{bins}": Metric(partial(error, equal_mass=True), lower=True, centered=True),
        f"brier{suffix}": Metric(brier, lower=True),
        f"reliability{suffix}@{bins}": Metric(partial(part, which=0), lower=True, centered=True),
        f"resolution{suffix}@{bins}": Metric(partial(part, which=1), centered=True),
        **({} if suffix else {"uncertainty": Metric(partial(part, which=2), lower=True)}),  # of the labels alone
    }


def _conformal(share: float) -> dict[str, Metric]:
    def covered(found: Predictions, weights: Floats) -> Floats:
        return metrics.weighted_mean(conformal_sets(found, share)[np.arange(len(found)), found.labels()], weights)

    def size(found: Predictions, weights: Floats) -> Floats:
        return metrics.weighted_mean(conformal_sets(found, share).sum(axis=1), weights)

    return {
        f"coverage@{share:g}": Metric(covered, mean=True),
        f"set_size@{share:g}": Metric(size, lower=True, share=False, contrasts=lambda _: []),
    }


def conformal_sets(found: Predictions, coverage: float) -> Bools:
    """Return which classes are in the set of each sample, bool (n, C)."""
    assert found.validation is not None, "the description is checked for validation rows"
    return probabilities(found) >= found.validation.threshold(coverage)


def _operating(asked: Operating) -> dict[str, Metric]:
    both = "needs samples of the positive and of other classes"

    def sides(found: Predictions) -> list[Contrast]:
        positive, _ = positive_score(found, asked.positive)
        return [(positive, ~positive)]

    def sensitivity(found: Predictions, weights: Floats, share: float) -> Floats:
        return metrics.sensitivity_at(*positive_score(found, asked.positive), weights, share)

    def benefit(found: Predictions, weights: Floats, threshold: float) -> Floats:
        probabilities(found)
        return metrics.net_benefit(*positive_score(found, asked.positive), weights, threshold)

    # A score has a rank within its fold alone; a probability means the same in all.
    return {
        f"sensitivity@{share:g}": Metric(
            mean_over_folds(partial(sensitivity, share=share)), contrasts=sides, undefined=both
        )
        for share in asked.specificity
    } | {
        f"net_benefit@{threshold:g}": Metric(partial(benefit, threshold=threshold), contrasts=sides)
        for threshold in asked.thresholds
    }


def _survival(times: tuple[float, ...]) -> dict[str, Metric]:
    def columns(found: Predictions) -> tuple[Floats, Bools]:
        return found.column("time"), found.column("event") > 0

    def area(found: Predictions, weights: Floats, at: float) -> Floats:
        time, event = columns(found)
        inverse = metrics.Censoring(time, event, weights).inverse(weights)
        risk, score = found.column("risk"), metrics.dynamic_auroc
        values = [
            score(risk[one], time[one], event[one], weights[:, one], inverse[:, one], at) for one in found.fold_masks()
        ]
        return metrics.mean_of_defined(np.stack(values, axis=1))

    def integral(found: Predictions, weights: Floats) -> Floats:
        alive = np.stack([found.column(alive_at(at)) for at in times], axis=1)
        return metrics.integrated_brier(alive, *columns(found), weights, times)

    beyond = "needs an event by then, and a patient who is seen beyond, in one fold"
    return {f"auroc@{at:g}": Metric(partial(area, at=at), undefined=beyond) for at in times} | {
        f"ibs@{times[0]:g}-{times[-1]:g}": Metric(
            integral, lower=True, undefined=f"needs a patient who is seen beyond {times[-1]:g}"
        )
    }


def alive_at(time: float) -> str:
    """Name of the column of predictions with the chance to live longer than a time."""
    return f"alive@{time:g}"


def _subgroups(column: str, scoring: Scoring) -> dict[str, Metric]:
    primary = scoring.metrics[scoring.primary]

    def over(found: Predictions, weights: Floats, combine: Callable[[Floats], Floats]) -> Floats:
        names, values, once = found.subgroups.get(column, np.empty(0, dtype=object)), [], np.ones((1, len(found)))
        for mask in (names == name for name in sorted(set(names.tolist()) - {""})):
            rows = found.take(mask)
            enough = len(set(rows.group.tolist())) >= FEWEST_GROUPS
            if enough and not np.isnan(primary(rows, once[:, mask])).any():
                values.append(primary(rows, weights[:, mask]))
        return combine(np.stack(values)) if len(values) > 1 else np.full(len(weights), np.nan)

    undefined = f"needs two subgroups of {FEWEST_GROUPS} groups in which {scoring.primary} has a value"

    def metric(combine: Callable[..., Floats], lower: bool) -> Metric:
        score = partial(over, combine=partial(combine, axis=0))
        # By chance alone two subgroups differ, and one of several is the worst.
        return Metric(score, lower=lower, share=primary.share, centered=True, undefined=undefined)

    return {
        f"gap_{column}": metric(np.ptp, lower=True),
        f"worst_{column}": metric(np.max if primary.lower else np.min, lower=primary.lower),
    }
