"""Survival prediction from bags of features, cross-validated by patients and scored by Harrell's concordance."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.bags import BagFeatures, Bags, make_bags
from mmkd.evaluate.classification import scoring_with_primary
from mmkd.evaluate.concordance import concordance
from mmkd.evaluate.cross_validation import Round, answers, folds_of, rounds
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.features import Features
from mmkd.evaluate.folds import folded_resamples, mean_over_folds
from mmkd.evaluate.heads.coxnet import Cohort, fit_coxnet
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.settings import SurvivalSettings, TaskSettings
from mmkd.evaluate.task import Scoring, Variant
from mmkd.store import UserError
from mmkd.store.layout import Tower

COLUMNS = ("risk", "time", "event")


class Survival:
    """Risk of every patient from the models of the folds that did not see the patient."""

    name = "survival"
    version = 1

    def towers(self, settings: TaskSettings) -> tuple[Tower, ...]:
        """The tower that the settings name."""
        return (settings.survival.tower,)

    def variants(self, settings: TaskSettings) -> tuple[Variant, ...]:
        """Every head, with each draw of folds and first weights."""
        own = settings.survival
        return tuple(Variant(head=head, seed=seed) for head in own.heads for seed in range(own.seeds))

    def scoring(self, settings: TaskSettings) -> Scoring:
        """Concordance within folds, averaged over folds; patients are resampled inside their folds."""
        standard = Scoring("standard", {"c_index": mean_over_folds(_c_index)}, "c_index", resamples=folded_resamples)
        return scoring_with_primary(standard, settings.survival.primary)

    def problems(self, data: DatasetRows, settings: TaskSettings) -> list[str]:
        """Times must be positive numbers that a patient's rows agree on, and there must be events."""
        try:
            bags = _patients(data)
            _, event = follow_up(bags)
            folds_of(bags, event.astype(np.int64), bags.groups, settings.survival.folds, seed=0)
        except UserError as error:
            return [str(error)]
        return []

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Risk, time and event of every patient, float64 (n, 3), with the fold that the patient was tested in."""
        settings = data.spec.settings.survival
        bags = _patients(data)
        time, event = follow_up(bags)
        group, even = bags.groups, event.astype(np.int64)
        fold = folds_of(bags, even, group, settings.folds, variant.seed)
        known = BagFeatures(bags, features, settings.tower)
        means, there = known.means()
        every_round = rounds(fold, there, even, group, variant.seed)
        cohort = Cohort(means, time, event, group)
        info: dict[str, Any] = {
            "events": int(event.sum()),
            "fold_sizes": np.bincount(fold).tolist(),
            "fold_events": np.bincount(fold, weights=event).astype(int).tolist(),
            "chosen": [],
        }
        head = _coxnet if variant.head == "coxnet" else _network
        risk = answers(
            len(bags), 1, every_round, lambda one: head(known, cohort, one, (variant, settings), info)[:, None]
        )
        score = np.column_stack([risk[:, 0], time, event])
        score[~there] = np.nan
        return Predictions(
            ids=bags.ids,
            group=group,
            domain=bags.domains,
            y=None,
            score=score,
            available=there,
            columns=COLUMNS,
            info=info,
            fold=fold,
        )


def follow_up(bags: Bags) -> tuple[Floats, NDArray[np.bool_]]:
    """Time float64 (n,) and event bool (n,) of every bag.

    Raises:
        UserError: a time that is no positive number, rows of a patient that differ, or no event at all.
    """
    columns = bags.data.spec.survival
    assert columns is not None, "the suite requires the columns for this task"
    event = bags.agreed(bags.samples.matching(columns.event).astype(object), " and ".join(columns.event)).astype(bool)
    time = np.empty(len(bags))
    for i, text in enumerate(bags.column(columns.time)):
        try:
            time[i] = float(text if text is not None else "nan")
        except ValueError:
            time[i] = np.nan
        if not (np.isfinite(time[i]) and time[i] > 0):
            raise UserError(f"{bags.ids[i]!r} has {columns.time}={text!r}, expected a time above zero")
    if not event.any():
        raise UserError(
            f"all {len(event)} patients are censored: no row has {columns.event}; check the column and what it counts"
        )
    return time, event


def _patients(data: DatasetRows) -> Bags:
    return make_bags(data, data.split("test"), data.spec.group or data.spec.bag)


def _c_index(predictions: Predictions, weights: Floats) -> Floats:
    return concordance(predictions.column("risk"), predictions.column("time"), predictions.column("event") > 0, weights)


def _coxnet(
    known: BagFeatures, cohort: Cohort, one: Round, how: tuple[Variant, SurvivalSettings], info: dict[str, Any]
) -> Floats:
    """Risk of the round's test patients by elastic-net Cox regression on mean features, float64 (m,)."""
    variant, settings = how
    model = fit_coxnet(cohort.take(one.seen), settings.coxnet, variant.seed)
    info["chosen"].append({"alpha": model.alpha, "coefficients": int((model.coefficients != 0).sum())})
    return model.risk(cohort.x[one.test])


def _network(
    known: BagFeatures, cohort: Cohort, one: Round, how: tuple[Variant, SurvivalSettings], info: dict[str, Any]
) -> Floats:
    """Risk of the round's test patients by attention over their patches, float64 (m,)."""
    from mmkd.evaluate.heads.abmil import fit_predict  # noqa: PLC0415 (torch, for those who ask for it)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchsurv uses torch.jit, which new versions of torch regret
        from mmkd.evaluate.heads.survival_losses import cox_task, hazard_task, risk_of_hazards  # noqa: PLC0415

    variant, settings = how
    time, event = cohort.time, cohort.event
    is_cox = variant.head == "abmil_cox"
    task = cox_task(time, event) if is_cox else hazard_task(time, event, one.seen, settings.bins)
    outputs, kept = fit_predict(known, task, (one.train, one.val, one.test), settings.mil, variant.seed)
    info["chosen"].append({"epoch": kept})
    return outputs[:, 0] if is_cox else risk_of_hazards(outputs)
